"""Prove a written checkpoint: load it from disk as a user would, and compare it with its source."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from . import families
from .modeling.lsg_config import MAX_GLOBAL_TOKENS
from .options import VerificationError
from .source import Source
from .weights import Written, same_bits


SAMPLE = "A text of 1,234 words (naïve, über-long; 漢字) isn't cut at 512 tokens anymore."
# For float64, where rounding cannot make a sparsifier choose another key.
PADDING_TOLERANCE = 1e-9
# Of T5 and its kin, whose norms compute in float32 whatever the dtype, and whose softmax does in older Transformers.
ROUNDED_TOLERANCE = 1e-4
# torch may take another kernel with a mask than without. On the CPUs that we saw the difference is 0.
SHORT_TOLERANCE = 1e-5

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """What was verified, the figure that shows it, and the seconds that it took, where they are of interest."""

    name: str
    figure: str
    seconds: float | None = None


@dataclass(frozen=True)
class HeadRun:
    """One head, run on long inputs.

    A forward pass reads as many tokens as the checkpoint can. A forward and backward pass in training reads the fewest
    that make every part of the attention sparse.
    """

    auto_class: str
    dtype: str
    forward_tokens: int
    forward_s: float
    training_tokens: int
    training_s: float


def require(condition: bool, message: str) -> None:
    if not condition:
        raise VerificationError(f"verification failed: {message}; nothing was written, please report this")


def checks(source: Source, config: Any, folder: Path, announce: Announce) -> Iterator[Check]:
    """Verify the checkpoint in `folder`, whose configuration is `config`; the weights of `source` are read anew.

    Raises:
        VerificationError: which names what does not hold.
    """
    announce("verifying the weights")
    original, new_weights, _ = source.load()
    written = Written(folder)
    yield unchanged_weights(source, original, written, new_weights)
    yield from position_tables(source, original, written)
    yield from global_table(source, original, written)
    expected = {}
    # Where rounding would hide what is compared: in half precision, and where scores are not scaled.
    widened = original.dtype != torch.float32 or not config.absolute_positions
    if widened:  # It will compute in float64, beside which sdpa takes no mask of its own dtype.
        original.set_attn_implementation("eager")
    for tokens in exact_lengths(source, config):
        announce(f"reading {tokens} tokens with the source")
        expected[tokens] = short_states(source.headless(original), tokens, widened)
    del original, written

    if source.tokenizer is not None:
        announce("verifying the tokenizer")
        yield same_tokenizer(source, folder)

    announce("loading the checkpoint")
    auto_class = families.auto_class(source.family.auto_class(source.family.headless(source.lsg_class)))
    model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    if expected:
        yield same_as_source(expected, model, widened)
    limit = source.options.max_sequence_length
    for tokens in sorted({min(16, limit), limit}):
        announce(f"reading {tokens} tokens")
        yield finite_output(model, fitting(model, tokens))
    announce("reading a row alone and padded")
    with in_float64(model):
        yield padding_invariance(model, limit)
        if config.causal:
            announce("reading a text again, and in steps")
            yield no_leak(model, limit)
            yield same_in_steps(model, limit)


def exact_lengths(source: Source, config: Any) -> list[int]:
    """Lengths at which a text must give what the source gives: the longest such, and those around which another part of
    the code takes over. None where there are global tokens, or other positions."""
    kept = source.options.position_init != "interpolate" and not source.is_lsg
    if not kept or config.num_global_tokens or config.mask_first_token:
        return []
    two_blocks = 2 * config.block_size
    longest = max(two_blocks, config.full_attention_length or 0)
    longest = min(longest, source.positions, source.options.max_sequence_length)
    if longest <= two_blocks:
        return [longest]
    return sorted({1, two_blocks, two_blocks + 1, longest - 1, longest})


def unchanged_weights(source: Source, original: PreTrainedModel, written: Written, new_weights: list[str]) -> Check:
    """All weights that a conversion leaves alone equal the source's. Of tied ones, one is written and compared."""
    base_class, state = source.family.base_class, original.state_dict()
    changed = {source.prefix + name for name in (*base_class.position_tables, base_class.global_table)}
    on_disk = {tensor.data_ptr() for name, tensor in state.items() if name in written.paths}
    compared = 0
    for name, tensor in state.items():
        require(name in written.paths or tensor.data_ptr() in on_disk, f"the weight {name} is missing")
        if name in written.paths and name not in changed and name not in new_weights:
            require(written.equals(name, tensor), f"the weight {name} is not the source's")
            compared += 1
    extra = written.paths.keys() - state.keys() - changed
    require(not extra, f"there are weights that the source lacks: {', '.join(sorted(extra))}")
    return Check("weights that stay equal the source's to the bit", f"{compared} tensors")


def position_tables(source: Source, original: PreTrainedModel, written: Written) -> Iterator[Check]:
    """Row `special + i` is the source's row `special + i mod n`, or lies between two of its rows, or is sinusoidal."""
    special, length, init = source.special_positions, source.options.max_sequence_length, source.options.position_init
    state, tables = original.state_dict(), source.family.base_class.position_tables
    for table in tables:
        name = source.prefix + table
        if name not in state:
            continue
        if source.family.config_class.sinusoidal_positions:
            rows, width = written[name].double(), written[name].shape[1]
            frequency = torch.tensor([10000.0 ** (-2 * (i // 2) / width) for i in range(width)], dtype=torch.float64)
            angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
            expected = torch.cat([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=1)
            tolerance = 2 * torch.finfo(written[name].dtype).eps
            require(rows.shape == expected.shape, f"{name} has not one row for each position")
            require(float((rows - expected).abs().max()) <= tolerance, f"{name} is not sinusoidal")
            yield Check(f"rows of {table.removesuffix('.weight')} are sinusoidal", f"{length} rows")
            continue
        trained = state[name]
        if init == "interpolate" or (init == "stretch" and table == tables[0]):
            step = length // source.positions if init == "stretch" else None
            yield between_rows(table.removesuffix(".weight"), trained, written[name], special, step)
            continue
        row = torch.arange(special + length)
        origin = torch.where(row < special, row, special + (row - special) % (trained.shape[0] - special))
        require(same_bits(written[name], trained[origin]), f"{name} does not repeat the source's rows")
        yield Check(f"rows of {table.removesuffix('.weight')} repeat the source's to the bit", f"{length} rows")


def between_rows(
    name: str, trained: torch.Tensor, written: torch.Tensor, special: int, step: int | None = None
) -> Check:
    """Each row lies on the line between the two trained rows around its place, which is computed in whole numbers; with
    a step, each `step`-th row is a trained one, to the bit, and behind the last of these all equal it."""
    require(same_bits(written[:special], trained[:special]), f"{name} has other rows before the first position")
    rows, new = trained[special:].double(), written[special:].double()
    worst, figure = 0.0, f"{len(new)} rows"
    across, steps = (len(rows) - 1, max(len(new) - 1, 1)) if step is None else (1, step)
    if step is not None:
        kept = same_bits(written[special::step], trained[special:])
        require(kept, f"{name} has not the source's rows at multiples of {step}")
        figure += f", those at multiples of {step} to the bit"
    for index, row in enumerate(new):
        low, rest = divmod(index * across, steps)
        expected = rows[low] + (rows[min(low + 1, len(rows) - 1)] - rows[low]) * (rest / steps)
        worst = max(worst, float((row - expected).abs().max()))
    allowed = torch.finfo(trained.dtype).eps * float(rows.abs().max())
    require(worst <= allowed, f"{name} is {worst:.0e} away from the lines between the source's rows")
    return Check(f"rows of {name} lie between the source's", f"{figure}, {worst:.0e}")


def global_table(source: Source, original: PreTrainedModel, written: Written) -> Iterator[Check]:
    """Each row is the source's, or the sum of a position (found by counting), a word and, where used, a token type."""
    base_class, state, options = source.family.base_class, source.tables(original), source.options
    name = source.prefix + base_class.global_table
    positions = source.global_positions(original)
    if positions is None:
        return
    table = written[name]
    require(bool(table.isfinite().all()), "a global token is not finite")
    kept = MAX_GLOBAL_TOKENS if options.resize_lsg else int(options.keep_first_global_token)
    if kept:
        require(same_bits(table[:kept], state[name][:kept]), "the global tokens are not the source's")
        yield Check("global tokens equal the source's to the bit", f"{kept} rows")
    if kept == MAX_GLOBAL_TOKENS:
        return
    words, token_type = source.global_words(original), source.token_type(state)
    step = max(len(positions) // MAX_GLOBAL_TOKENS, 1)
    stride = max(options.global_positional_stride // step, 1)
    while MAX_GLOBAL_TOKENS % stride:
        stride -= 1
    origin = [start for first in range(stride) for start in range(first, MAX_GLOBAL_TOKENS, stride)]
    for row in range(kept, MAX_GLOBAL_TOKENS):
        expected = positions[origin[row] * step % len(positions)].float() + words[row]
        if token_type is not None:
            expected = expected + token_type.float()
        correct = same_bits(table[row], expected.to(positions.dtype))
        require(correct, f"row {row} of the global tokens is not as it should be")
    parts = "position + word" + ("" if token_type is None else " + token type")
    if not any(source.prefix + table in state for table in base_class.position_tables):
        parts = "word"
    yield Check(f"global tokens are {parts}, to the bit", f"{len(table) - kept} rows")


def same_tokenizer(source: Source, folder: Path) -> Check:
    """The written tokenizer gives the source's ids, and allows the new length."""
    written, length = AutoTokenizer.from_pretrained(folder), source.options.max_sequence_length
    assert source.tokenizer is not None
    require(written(SAMPLE)["input_ids"] == source.tokenizer(SAMPLE)["input_ids"], "the tokenizer gives other ids")
    require(written.model_max_length == length, f"the tokenizer allows {written.model_max_length} tokens")
    return Check("the tokenizer gives the source's ids", f"up to {length} tokens")


def fitting(model: PreTrainedModel, tokens: int) -> int:
    """The most tokens, up to `tokens`, that the model takes: with adaptive=False a whole number of blocks."""
    block = model.config.block_size
    return tokens if model.config.adaptive or model.config.layout.is_short(tokens) else tokens // block * block


def random_ids(model: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """Token ids, always the same, of shape (rows, tokens); a decoder that has its own words knows them too."""
    words = model.config.vocab_size
    words = min(words, getattr(model.config, "decoder_vocab_size", words))
    return torch.randint(words, (rows, tokens), generator=torch.Generator().manual_seed(0))


def random_text(model: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """The same without padding, by which RoBERTa-like models count positions, and without the token that masks, which
    ESM counts in what is padding too."""
    ids = random_ids(model, rows, tokens)
    for token in (getattr(model.config, "mask_token_id", None), model.config.pad_token_id):
        if token is not None:
            ids[ids == token] = (token + 1) % model.config.vocab_size
    return ids


def relative_difference(states: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference from `states`, by the largest of these."""
    return float((states - others).abs().max() / states.abs().max())


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def inputs_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model, LSG or stock, must be given for a text."""
    names = families.family(model.config.model_type).base_class.required_inputs
    return {"input_ids": ids, **{name: ids.new_zeros(len(ids)) for name in names}}


def tensors_of(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those outputs of a model that are tensors, by their names."""
    return {name: value for name, value in outputs.items() if torch.is_tensor(value)}


def read(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The states of a text, shape (rows, tokens, width), and, of an encoder-decoder, those of a few decoded tokens."""
    inputs = inputs_of(model, ids)
    if "decoder_input_ids" not in signature(model.forward).parameters:
        return [model(**inputs, attention_mask=mask).last_hidden_state]
    outputs = model(**inputs, attention_mask=mask, decoder_input_ids=ids[:, :5])
    return [outputs.encoder_last_hidden_state[:, -ids.shape[1] :], outputs.last_hidden_state]


@torch.no_grad()
def finite_output(model: PreTrainedModel, tokens: int) -> Check:
    """A text of `tokens` tokens gives as many finite states."""
    start = time.perf_counter()
    states = read(model, random_ids(model, 1, tokens))
    seconds = time.perf_counter() - start
    require(states[0].shape[1] == tokens, f"{tokens} tokens give {states[0].shape[1]} states")
    require(all(bool(part.isfinite().all()) for part in states), f"{tokens} tokens give states that are not finite")
    return Check(f"{tokens} tokens give finite states", dtype_name(model), seconds)


def short_states(model: PreTrainedModel, tokens: int, widened: bool) -> list[torch.Tensor]:
    """The states of a text of `tokens` tokens, by the model without its head; in float64 where they are `widened`."""
    with torch.no_grad(), in_float64(model) if widened else nullcontext():
        return read(model.eval(), random_ids(model, 1, tokens))


def same_as_source(expected: dict[int, list[torch.Tensor]], model: PreTrainedModel, widened: bool) -> Check:
    """Texts that the source can read give what it gives; `expected` are its states, by the length of the text."""
    name = f"{', '.join(map(str, expected))} tokens give what the source gives"
    difference, same = 0.0, True
    for tokens, states in expected.items():
        for a, b in zip(states, short_states(model, tokens, widened), strict=True):
            same = same and same_bits(a, b)
            difference = max(difference, float((a - b).abs().max()))
        require(
            difference <= (SHORT_TOLERANCE if model.config.absolute_positions else ROUNDED_TOLERANCE),
            f"a text of {tokens} tokens gives states {difference:.0e} away from the source's",
        )
    return Check(name, "to the bit" if same else f"difference {difference:.0e}")


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute in float64. A module's weights are widened only while it runs, to save memory."""
    kept: dict[nn.Module, dict[str, Any]] = {}
    opened: dict[nn.Module, list[nn.Module]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        # T5 asks for the dtype of `wo` before it calls it.
        parts = (module, *(part for name, part in module.named_children() if name == "wo"))
        opened[module] = [part for part in parts if part._parameters and part not in kept]
        for part in opened[module]:
            kept[part] = dict(part._parameters)
            for name, parameter in kept[part].items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.double(), requires_grad=False)

    def restore(module: nn.Module, _: Any, output: Any) -> None:
        for part in opened.pop(module):
            part._parameters.update(kept.pop(part))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda module, _, output: output.double()))
        elif module._parameters or hasattr(module, "wo"):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
        table = getattr(module, "rel_embeddings", None)  # of which DeBERTa's stack of layers reads the weight
        if table is not None:
            handles.append(module.register_forward_pre_hook(lambda _, args, table=table: widen(table, args)))
            handles.append(module.register_forward_hook(lambda _, args, out, table=table: restore(table, args, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def padding_invariance(model: PreTrainedModel, limit: int) -> Check:
    """A row gives the same alone and beside a longer one."""
    padded_length = fitting(model, min(4 * model.config.block_size + 1, limit))
    length = fitting(model, -(-5 * padded_length // 8))
    ids = random_text(model, 2, padded_length)
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    alone = read(model, ids[:1, :length])
    padded = read(model, ids, mask)
    difference = max(relative_difference(a, b[:1, : a.shape[1]]) for a, b in zip(alone, padded, strict=True))
    tolerance = PADDING_TOLERANCE if model.config.absolute_positions else ROUNDED_TOLERANCE
    require(difference <= tolerance, f"padding changes a row by {difference:.1e}")
    return Check(f"{length} tokens give the same alone and padded to {padded_length}", f"{difference:.0e}, float64")


def long_text(model: PreTrainedModel, limit: int) -> tuple[torch.Tensor, int]:
    """A text that every part of the attention reads, shape (1, tokens), and a place in it where its sparse keys are
    those of several blocks."""
    tokens = fitting(model, min(5 * model.config.block_size + 3, limit))
    return random_text(model, 1, tokens), max(3 * tokens // 4, 1)


@torch.no_grad()
def no_leak(model: PreTrainedModel, limit: int) -> Check:
    """Other tokens behind a place change no state before it."""
    ids, place = long_text(model, limit)
    other = ids.clone()
    other[:, place:] = (ids[:, place:] + 1) % model.config.vocab_size
    before, after = (read(model, x)[0][:, :place] for x in (ids, other))
    difference = relative_difference(before, after)
    require(difference <= PADDING_TOLERANCE, f"tokens behind a place change those before it by {difference:.1e}")
    return Check(
        f"the last {ids.shape[1] - place} of {ids.shape[1]} tokens change none before", f"{difference:.0e}, float64"
    )


@torch.no_grad()
def same_in_steps(model: PreTrainedModel, limit: int) -> Check:
    """A text gives the same in steps, with a cache, as at once."""
    ids, place = long_text(model, limit)
    whole, parts, cache = read(model, ids)[0], [], None
    steps = [place, *[1] * min(4, ids.shape[1] - place), max(ids.shape[1] - place - 4, 0)]
    for tokens in ids.split([tokens for tokens in steps if tokens], dim=1):
        outputs = model(**inputs_of(model, tokens), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.last_hidden_state)
    difference = relative_difference(whole, torch.cat(parts, dim=1))
    require(difference <= PADDING_TOLERANCE, f"steps with a cache change a text by {difference:.1e}")
    return Check(f"{ids.shape[1]} tokens give the same in steps and at once", f"{difference:.0e}, float64")


def run_heads(source: Source, folder: Path, announce: Announce) -> Iterator[HeadRun]:
    """Run every head of the checkpoint on long inputs, in evaluation and in training.

    Raises:
        VerificationError: where a head gives a value or a gradient that is not finite.
    """
    seen = set()
    for name, target in source.family.auto_map.items():
        if name == "AutoConfig" or target in seen:
            continue
        seen.add(target)
        for dtype in (torch.float32, torch.bfloat16):
            announce(f"running {name} in {str(dtype).removeprefix('torch.')}")
            # A head of another size than the checkpoint's is new: where that has three classes, a choice has one score.
            options = {"trust_remote_code": True, "dtype": dtype, "ignore_mismatched_sizes": True}
            if name == "AutoModelForQuestionAnswering":
                options["num_labels"] = 2  # where an answer begins, and where it ends
            model = families.auto_class(name).from_pretrained(folder, **options)
            yield run_head(name, model, source.options.max_sequence_length)


def run_head(name: str, model: PreTrainedModel, limit: int) -> HeadRun:
    """Run one head, forward in evaluation, forward and backward in training. Raises VerificationError."""

    def forward(tokens: int) -> torch.Tensor:
        ids = random_ids(model, 1, tokens)
        if hasattr(model.config, "question_token_id"):
            ids[:, 0] = model.config.question_token_id  # where Splinter's heads look
        inputs = inputs_of(model, ids[:, None] if name == "AutoModelForMultipleChoice" else ids)
        if model.config.is_encoder_decoder:
            ids[:, -1] = model.config.eos_token_id  # where the classifying heads look
            inputs["decoder_input_ids"] = ids
        outputs = tensors_of(model(**inputs))
        total = torch.stack([output.float().mean() for output in outputs.values()]).sum()
        require(bool(total.isfinite()), f"{name} gives values that are not finite")
        return total

    evaluated, trained = fitting(model, limit), fitting(model, min(4 * model.config.block_size + 1, limit))
    start = time.perf_counter()
    model.eval()
    with torch.no_grad():
        forward(evaluated)
    middle = time.perf_counter()
    model.train()
    forward(trained).backward()
    end = time.perf_counter()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    require(
        bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients),
        f"{name} has gradients that are not finite",
    )
    return HeadRun(name, dtype_name(model), evaluated, middle - start, trained, end - middle)
