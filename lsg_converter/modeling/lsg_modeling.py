"""What an LSG model does: global tokens in, global tokens out, masks, and the states captured on the way.

A family's classes are its stock classes of Transformers with one of these mixed in. Nothing is registered in
Transformers: LSG lives in the modules of a model, and `config._attn_implementation` picks its kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TransformersKwargs, logging

from .lsg_attention import ATTN_IMPLEMENTATIONS
from .lsg_classes import LSGPreTrained, define_modules, stock_class
from .lsg_config import MAX_GLOBAL_TOKENS
from .lsg_generation import CACHE_NAMES, Past, given_cache, prepare_cache
from .lsg_layout import is_exporting
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGNamedEncoder, LSGSelfAttention, global_tokens
from .lsg_packing import Packing, pack_batch, promote


logger = logging.get_logger(__name__)

# What every model of Transformers takes beside the arguments of its forward.
KNOWN_ARGUMENTS = {*TransformersKwargs.__annotations__, "output_attentions", "output_hidden_states", "return_dict"}


def argument_names(stock_forward: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments but for `self` and `**kwargs`."""
    return [name for name in signature(stock_forward).parameters if name not in ("self", "kwargs")]


def with_global_tokens(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the stock forward of a model that reads a text: global tokens go in, and are cut off what comes out.

    The result has the stock signature. It returns hidden states of `t` positions. With "eager", `attentions` holds what
    the text attends to: (batch, heads, t, t) for a text of at most two blocks, else (batch, heads, t, keys), with the
    keys in the order that `lsg_attention` states; `global_attentions` holds (batch, heads, g, g + t).

    A cache may hold keys and values of `p` tokens in front of the text, as in prefix tuning: all tokens see them. Then
    `attention_mask` may be (batch, p + t), and probabilities have `p` keys more, in front.

    In a decoder a cache holds the text before the new tokens, and `attention_mask` is of all. With "eager" the
    probabilities of a step are (batch, heads, new tokens, keys), its keys being those of `t` tokens in all, up to two
    blocks, and else the globals, the blocks `i - 1` and `i`, and the sparse keys.
    """
    names = argument_names(stock_forward)

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if given_cache(kwargs) is not None and not (self.takes_cache and {*CACHE_NAMES} & {*names}):
            name = type(self).__name__
            raise ValueError(f"past_key_values: got a cache; {name}, as its stock model, reads none; leave it out")
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        promoted, packing, prefix = kwargs.pop("global_attention_mask", None), None, 0
        past: Past | None = None
        if "position_ids" not in names and kwargs.pop("position_ids", None) is not None:
            logger.warning_once(f"position_ids: {type(self).__name__} has no such argument, and ignores it")
        if tokens is not None:
            self.check_input(tokens, kwargs)
            self.warn_of_unknown(kwargs, names)
            kernel, causal = self.config.kernel, self.config.causal
            prefix_mask = None if causal else self.cut_prefix(kwargs, tokens)
            if prefix_mask is not None:
                kwargs["prefix_mask"], prefix = prefix_mask, prefix_mask.shape[1]
                kernel = "portable"  # The rows of a cache do not lie end to end.
            first_token = self.find_first_token(kwargs)
            self.embed_text(kwargs, first_token)
            if causal:
                past = self.read_past(kwargs, tokens, first_token)
                if kwargs.get("encoder_hidden_states") is not None:
                    kernel = "portable"  # Rows of text go with rows that the encoder has read.
            mask = self.extend_mask(kwargs.get("attention_mask"), tokens, first_token)
            if self.config.position_step > 1 and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = self.stretched_positions(kwargs, tokens, mask, prefix)
            if past is None or not past.is_step:
                packing = pack_batch(mask, first_token, self.config.num_global_tokens, kernel)
            if past is not None:
                kwargs["past"] = past = past._replace(packing=packing)
            promoted = self.find_promoted(promoted, mask)
            if promoted is not None:
                kwargs["promotion"] = promote(promoted, mask, packing, self.config.num_global_tokens)
            if packing is not None:
                kwargs["packing"] = packing
            kwargs["attention_mask"] = mask
            self.insert_global_tokens(kwargs)
        outputs = self.read(stock_forward, kwargs)
        self.strip_outputs(outputs, packing, promoted, prefix, past)
        return outputs if return_dict else outputs.to_tuple()

    return forward


class LSGReader(LSGPreTrained):
    """Mixed into a model that reads a text: a base model, or an encoder.

    Attributes:
        lsg_modules: which mixin goes over which stock module: the name of its class, without the family's in front.
        position_offset: rows of a position table before that of the first token, which
            `config.max_position_embeddings` does not count.
        positions_follow_padding: whether those rows are all up to the padding id's, and only tokens that are no padding
            have positions; or there are no positions at all.
        takes_cache: whether an argument for a cache, where the stock forward has one, is for it.
        replacements: stock classes of modules, and the LSG class of each.
    """

    lsg_modules: ClassVar[Mapping[str, type]]
    position_offset: ClassVar[int] = 0
    positions_follow_padding: ClassVar[bool] = False
    takes_cache: ClassVar[bool] = True
    replacements: ClassVar[Mapping[type, type]]
    has_seen_a_mask: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = stock_class(cls)
        if issubclass(stock, PreTrainedModel) and not issubclass(stock, LSGReader):
            cls.forward = with_global_tokens(stock.forward)  # type: ignore[attr-defined]
            cls.replacements = define_modules(cls)
            names = {module.__name__: replacement.__name__ for module, replacement in cls.replacements.items()}
            cls._no_split_modules = [names.get(name, name) for name in stock._no_split_modules or ()]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.validate()  # A field may have been set since it was made.
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.replace_modules()
        self.add_global_embeddings(config)
        self.post_init()  # type: ignore[attr-defined]

    def replace_modules(self) -> None:
        """Make LSG modules of the stock ones in place: they keep their weights, and what is set on them."""
        for module in list(self.modules()):  # type: ignore[attr-defined]
            replacement = self.replacements.get(type(module))
            if replacement is not None:
                module.__class__ = replacement
                module.config = self.config  # type: ignore[attr-defined]
                if isinstance(module, LSGEmbeddings):
                    module.add_global_embeddings(self.config)  # type: ignore[attr-defined]

    def add_global_embeddings(self, config: Any) -> None:
        """Add the table of the global tokens, where no module of the model holds it."""

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """As in Transformers."""
        super().resize_position_embeddings(new_num_position_embeddings)  # type: ignore[misc]
        self.replace_modules()
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "position_ids"):  # which DistilBERT's stock method leaves at its old length
                module.position_ids = torch.arange(new_num_position_embeddings, device=module.position_ids.device)[None]

    @classmethod
    def special_positions(cls, config: Any) -> int:
        """Rows of a position table before that of the first token."""
        return config.pad_token_id + 1 if cls.positions_follow_padding else cls.position_offset

    @classmethod
    def counted_positions(cls, config: Any) -> int:
        """How many of them `config.max_position_embeddings` counts."""
        return cls.special_positions(config) - cls.position_offset

    @property
    def text_positions(self) -> Any:
        """How many tokens of text have a position; None where there are no positions, and so no end."""
        config: Any = self.config  # type: ignore[attr-defined]
        return config.max_position_embeddings - self.counted_positions(config) if config.absolute_positions else None

    def check_input(self, tokens: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError where the model cannot read a text; warn where the kernel cannot give what is asked for."""
        if tokens.dim() < 2:
            raise ValueError(f"input_ids: got shape {tuple(tokens.shape)}; it must be (batch, tokens)")
        config, (rows, length) = self.config, tokens.shape[:2]  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():
            config.validate_lsg()  # A field may have been set since the last text.
        cache = given_cache(arguments)
        limit = self.text_positions
        past = 0 if cache is None else cache.get_seq_length()
        if limit is not None and not (torch.compiler.is_compiling() and isinstance(past, torch.Tensor)):
            limit -= int(past)  # which of a static cache is a tensor
        if rows == 0:
            raise ValueError("input_ids: got a batch of 0 texts; at least 1 is needed")
        if length == 0:
            raise ValueError("input_ids: got a text of 0 tokens; at least 1 is needed")
        positions = arguments.get("position_ids")
        if (limit is not None and length > limit) and (
            positions is None
            or not (torch.compiler.is_compiling() or int(positions.max()) < config.max_position_embeddings)
        ):
            behind, more = (f" behind {past} in a cache", " more") if past else ("", "")
            raise ValueError(
                f"input_ids: got a text of {length} tokens{behind}; this checkpoint has positions for {limit}{more}; "
                "truncate the text, or convert with a larger max_sequence_length"
            )
        if (
            not config.adaptive
            and not is_exporting()
            and not config.layout.is_short(length)
            and length % config.block_size
        ):
            raise ValueError(
                f"input_ids: got a text of {length} tokens; with adaptive=False it must be a multiple of block_size, "
                f"{config.block_size}, or at most two blocks; pad it, or set adaptive=True"
            )
        if config._attn_implementation not in ATTN_IMPLEMENTATIONS:
            allowed = " and ".join(map(repr, ATTN_IMPLEMENTATIONS))
            raise ValueError(f"attn_implementation: got {config._attn_implementation!r}; LSG has {allowed}")
        wanted = arguments.get("output_attentions")
        if (config.output_attentions if wanted is None else wanted) and config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions: the {config._attn_implementation!r} kernel holds no probabilities and gives none; "
                "load the model with attn_implementation='eager'"
            )

    @property
    def moves_with_padding(self) -> bool:
        """Whether padding on the left changes no token's position."""
        return self.positions_follow_padding

    def find_first_token(self, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """The place of each row's first token, shape (batch,), where padding on the left does not change the token's
        position: then blocks count from it. Else None: they count from place 0."""
        mask = arguments.get("attention_mask")
        if mask is None:
            return None
        if self.moves_with_padding or arguments.get("position_ids") is not None:
            return (mask != 0).int().argmax(dim=1)
        self.warn_of_left_padding(mask)
        return None

    def warn_of_left_padding(self, attention_mask: torch.Tensor) -> None:
        """Say once where padding on the left, of a mask (batch, t), changes what a row gives. On a GPU a look at a mask
        waits for what computes it, so that there it is the first one alone which is looked at."""
        plain = type(attention_mask) is torch.Tensor and not attention_mask.is_meta and attention_mask.dim() == 2
        if torch.compiler.is_compiling() or is_exporting() or not plain:
            return
        if self.has_seen_a_mask and attention_mask.device.type != "cpu":
            return
        self.has_seen_a_mask = True
        if bool(((attention_mask[:, 0] == 0) & (attention_mask != 0).any(dim=1)).any()):
            takes_positions = "position_ids" in signature(type(self).forward).parameters  # type: ignore[attr-defined]
            logger.warning_once(
                "attention_mask: got padding on the left, by which a row's positions, and here its blocks, move, so "
                f"that it gives other states; pad on the right{', or give position_ids' if takes_positions else ''}"
            )

    def find_promoted(self, global_attention_mask: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | None:
        """The tokens of the text that see all and that all see, boolean, (batch, t); None where there are none, or full
        attention is theirs anyway. Raises ValueError where they are too many, or the shape does not fit, and in an
        exported graph, which would be for one number of them."""
        config = self.config  # type: ignore[attr-defined]
        g, shape = config.num_global_tokens, (mask.shape[0], mask.shape[-1] - config.num_global_tokens)
        if global_attention_mask is None:
            return None
        if config.causal:
            raise ValueError(
                "global_attention_mask: got one for a decoder, whose tokens see none behind them; leave it out"
            )
        if global_attention_mask.shape != shape:
            got = tuple(global_attention_mask.shape)
            raise ValueError(f"global_attention_mask: got shape {got}; it must be (batch, tokens), {shape}")
        if is_exporting():
            raise ValueError(
                "global_attention_mask: got one while exporting; an exported graph takes none; leave it out"
            )
        promoted = (global_attention_mask.to(mask.device) != 0) & mask[:, 0, 0, g:]
        most = int(promoted.sum(dim=1).max())
        if g + most > MAX_GLOBAL_TOKENS:
            raise ValueError(
                f"global_attention_mask: got {most} tokens in a row, beside {g} global tokens; allowed are "
                f"{MAX_GLOBAL_TOKENS} in all"
            )
        return promoted if most and not config.layout.is_short(shape[1]) else None

    def warn_of_unknown(self, arguments: Mapping[str, Any], names: Sequence[str]) -> None:
        """Warn of arguments that nobody reads; stock models swallow them without a word."""
        for name in arguments.keys() - {*names, *CACHE_NAMES, *KNOWN_ARGUMENTS}:
            logger.warning_once(f"{name}: {type(self).__name__} has no such argument, and ignores it")

    def extend_mask(
        self, attention_mask: torch.Tensor | None, tokens: torch.Tensor, first_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mask of global tokens and text: boolean, (batch, 1, 1, g + t), which Transformers leaves as it is.

        `attention_mask` is (batch, t), and zero where a token is padding; None means that there is no padding.
        """
        config, shape = self.config, tokens.shape[:2]  # type: ignore[attr-defined]
        if attention_mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        elif attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; it must be (batch, tokens), {tuple(shape)}"
            )
        else:
            mask = attention_mask.to(device=tokens.device, dtype=torch.bool)
        if config.mask_first_token:
            places = torch.arange(shape[1], device=mask.device)
            mask = mask & (places != (0 if first_token is None else first_token[:, None]))
        mask = torch.cat([mask.new_ones(shape[0], config.num_global_tokens), mask], dim=1)
        return mask[:, None, None]

    def stretched_positions(
        self, arguments: Mapping[str, Any], tokens: torch.Tensor, mask: torch.Tensor, prefix: int
    ) -> torch.Tensor:
        """The rows of a stretched position table that the tokens of a batch read: int64, (batch, t).

        Each row of the batch goes in the largest step up to `position_step` that, times the length of its text, is at
        most the length of the table. A text ends at its last token that is not masked. In steps of 1 it would read the
        rows of the stock model.

        Args:
            arguments: of the forward.
            tokens: its ids or embeddings, (batch, t, ...).
            mask: as `extend_mask` gives it.
            prefix: tokens of a cache in front of the text.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        special, available = self.special_positions(config), self.text_positions
        if self.positions_follow_padding and arguments.get("inputs_embeds") is None:
            kept = (tokens != config.pad_token_id).long()
            place = (kept.cumsum(dim=1) + prefix) * kept - 1  # -1 where there is padding
        else:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            place = place + (0 if self.positions_follow_padding else prefix)
        text = mask[:, 0, 0, config.num_global_tokens :]
        length = ((place + 1) * text).amax(dim=1, keepdim=True).clamp(min=1)
        step = torch.full_like(length, available).div(length, rounding_mode="floor")
        step = step.clamp(min=1, max=config.position_step)
        return special + (place * step).clamp(min=-1, max=available - 1)

    def read_past(
        self, arguments: dict[str, Any], tokens: torch.Tensor, first_token: torch.Tensor | None
    ) -> Past | None:
        """What a decoder knows of the text in a cache; None where it keeps none. The cache, which a model makes for
        itself where it gets none, and the mask of the new tokens alone, are left in `arguments`."""
        config: Any = self.config  # type: ignore[attr-defined]
        name = next((name for name in CACHE_NAMES if arguments.get(name) is not None), CACHE_NAMES[0])
        use_cache = arguments.get("use_cache")
        if arguments.get(name) is None and not (config.use_cache if use_cache is None else use_cache):
            return None
        with_cross_attention = arguments.get("encoder_hidden_states") is not None
        arguments[name] = prepare_cache(arguments.get(name), with_cross_attention)
        past = Past.of(given_cache(arguments), arguments.get("attention_mask"), first_token, tokens)
        past = past.hide(config.mask_first_token)
        arguments["attention_mask"] = None if past.is_step else past.mask[:, : tokens.shape[1]]
        return past

    def cut_prefix(self, arguments: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
        """The mask of a cache's tokens, (batch, p), cut off `attention_mask`; None where there is no cache."""
        cache, mask = given_cache(arguments), arguments.get("attention_mask")
        if cache is None:
            return None
        rows, length = tokens.shape[:2]
        p = cache.get_seq_length()
        if mask is None or mask.shape != (rows, p + length):
            return torch.ones(rows, p, dtype=torch.bool, device=tokens.device)
        arguments["attention_mask"] = mask[:, p:]
        return mask[:, :p].to(device=tokens.device, dtype=torch.bool)

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the stock forward, with arguments that fit an LSG model."""
        return stock_forward(self, **arguments, return_dict=True)

    def fill_captured(self, arguments: dict[str, Any]) -> None:
        """Put in what the configuration says of `output_attentions` and `output_hidden_states`, if a call does not."""
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name) is None:
                arguments[name] = getattr(self.config, name)  # type: ignore[attr-defined]

    def embed_text(self, arguments: dict[str, Any], first_token: torch.Tensor | None) -> None:
        """Call the embeddings module, where that must be before the mask is that of the global tokens too."""

    def insert_global_tokens(self, arguments: dict[str, Any]) -> None:
        """Put the global tokens in front of the text, where the embeddings module does not."""

    def strip_last_state(self, outputs: Any, packing: Packing | None) -> None:
        """The same for the last state, where the stack of layers has not done it."""

    def strip_outputs(
        self, outputs: Any, packing: Packing | None, promoted: torch.Tensor | None, prefix: int, past: Past | None
    ) -> None:
        """Cut the global tokens off the captured states and probabilities, and unpack them."""
        self.strip_last_state(outputs, packing)
        config = self.config  # type: ignore[attr-defined]
        g = config.num_global_tokens
        if outputs.get("hidden_states"):
            *inner, last = outputs["hidden_states"]
            unpack = packing.unpack if packing is not None else lambda states: states
            inner = [None if states is None else unpack(states)[:, g:] for states in inner]
            outputs["hidden_states"] = (*inner, last)
        if outputs.get("cross_attentions"):
            outputs["cross_attentions"] = tuple(x[:, :, g:] for x in outputs["cross_attentions"])
        before = past.length if past is not None and past.is_step and isinstance(past.length, int) else 0
        split_attentions(outputs, config, prefix, None if packing is None else packing.first_token, promoted, before)


def split_attentions(
    outputs: Any,
    config: Any,
    prefix: int,
    first_token: torch.Tensor | None,
    promoted: torch.Tensor | None,
    before: int = 0,
) -> None:
    """Split the captured probabilities into those of the text and those of the global tokens.

    In a step of generation `before` tokens stand in the cache. Rows that were read from their first token on get their
    places back. Promoted tokens have theirs behind the global tokens', and NaN among those of the text.
    """
    if outputs.get("attentions") and outputs["attentions"][0] is None:  # of a kernel that holds none
        outputs["attentions"] = ()
    if not outputs.get("attentions"):
        return
    text, to_all = zip(*outputs["attentions"], strict=True)
    length = text[0].shape[2]
    full = config.layout.is_short(before + length)
    if full:
        stop = prefix + config.num_global_tokens
        text = tuple(torch.cat([x[..., :prefix], x[..., stop:]], dim=-1) for x in text)
    if first_token is not None:
        places = torch.arange(length, device=text[0].device) - first_token[:, None]
        places = torch.where(places < 0, places + length, places)
        text = tuple(torch.take_along_dim(x, places[:, None, :, None], dim=2) for x in text)
        to_all = tuple(_with_places(x, places) for x in to_all)
        if full:
            text = tuple(_with_places(x, places) for x in text)
    if promoted is not None:
        text = tuple(x.masked_fill(promoted[:, None, :, None], torch.nan) for x in text)
    outputs["attentions"], outputs["global_attentions"] = text, to_all


def _with_places(probabilities: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The last keys, which are those of the text, in the order of `places`, (batch, t)."""
    others, text = probabilities.split([probabilities.shape[-1] - places.shape[1], places.shape[1]], dim=-1)
    return torch.cat([others, torch.take_along_dim(text, places[:, None, None], dim=-1)], dim=-1)


class LSGModel(LSGReader):
    """Mixed into the base model of a BERT-like family.

    Attributes:
        global_token_type: whether the global tokens carry token type 0.
        global_types: of what other tables, such as `task_type_embeddings`, they carry the first row, where the model
            has them; without `_embeddings`.
        required_inputs: arguments by row, of zeros, that a text must come with.
    """

    lsg_modules = {
        "Embeddings": LSGEmbeddings,
        "SelfAttention": LSGSelfAttention,
        "Encoder": LSGEncoder,
        "Transformer": LSGEncoder,
    }
    position_tables: ClassVar[tuple[str, ...]] = ("embeddings.position_embeddings.weight",)
    global_table: ClassVar[str] = "embeddings.global_embeddings.weight"
    global_token_type: ClassVar[bool] = False
    global_types: ClassVar[tuple[str, ...]] = ()
    required_inputs: ClassVar[tuple[str, ...]] = ()


class LSGRestatedModel(LSGModel):
    """Mixed into the base model of a family whose stock forward hands its stack no arguments that it does not know: its
    embeddings, of the arguments in `embedded`, its stack and its pooler are called here instead."""

    embedded: ClassVar[tuple[str, ...]] = ("input_ids", "inputs_embeds", "position_ids")

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        if (arguments.get("input_ids") is None) == (arguments.get("inputs_embeds") is None):
            return super().read(stock_forward, arguments)  # which raises
        self.fill_captured(arguments)
        states = self.embeddings(**{name: arguments.pop(name, None) for name in self.embedded})  # type: ignore[attr-defined]
        outputs = self.encoder(states, **arguments)  # type: ignore[attr-defined]
        pooler = getattr(self, "pooler", None)
        if pooler is None:
            return outputs
        return BaseModelOutputWithPooling(pooler_output=pooler(outputs.last_hidden_state), **outputs)


class LSGEmbeddedModel(LSGModel):
    """Mixed into the base model of a family whose embeddings see the mask, and for which `inputs_embeds` are what they
    give, so that the global tokens join outside of them. Its positions may be rotary: then a global token stands at the
    place of the first token."""

    lsg_modules = {"SelfAttention": LSGSelfAttention, "Encoder": LSGNamedEncoder}
    global_table = "global_embeddings.weight"

    def add_global_embeddings(self, config: Any) -> None:
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, config.hidden_size)

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the stock forward, with arguments that fit an LSG model."""
        return stock_forward(self, **arguments, return_dict=True)

    def embed_text(self, arguments: dict[str, Any], first_token: torch.Tensor | None) -> None:
        if arguments.get("inputs_embeds") is None:
            mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
            if mask is not None:
                # A row of padding alone has no share of masked tokens, by which embeddings are scaled.
                mask = mask.masked_fill((mask == 0).all(dim=1, keepdim=True), 1)
            arguments["inputs_embeds"] = self.embeddings(arguments.pop("input_ids"), mask, positions)  # type: ignore[attr-defined]
        text = arguments["inputs_embeds"]
        if arguments.get("position_ids") is None:
            first = 0 if first_token is None else first_token[:, None]
            places = torch.arange(text.shape[1], device=text.device) - first
            arguments["position_ids"] = places.clamp(min=0).expand(text.shape[:2])

    def insert_global_tokens(self, arguments: dict[str, Any]) -> None:
        text, norm = arguments["inputs_embeds"], self.embeddings.layer_norm  # type: ignore[attr-defined]
        tokens = global_tokens(self, text)
        if norm is not None:
            tokens = norm(tokens)
        arguments["inputs_embeds"] = torch.cat([tokens.to(text), text], dim=1)
        arguments["position_ids"] = F.pad(arguments["position_ids"], (tokens.shape[1], 0))
