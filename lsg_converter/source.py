"""Reading a source safely: its files are examined before anything is loaded from them."""

import copy
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import families, surgery
from .options import GLOBAL_TOKEN_FLAGS, ConversionOptions, OptionError, SourceError, first_line
from .weights import examine, read_json, weight_files


# Files of a tokenizer that Transformers reads, but does not always write.
TOKENIZER_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Weights in formats that are not read, as names on the Hub.
OTHER_FORMATS = ("onnx/*", "openvino/*", "*.onnx_data", "flax_*", "tf_*")
# Settings of a ColBERT checkpoint: the tokens that mark a query and a document, and their lengths.
COLBERT_SETTINGS = "artifact.metadata"
# Heads of BGE-M3, which its own library loads from beside the model.
PICKLED_HEADS = ("sparse_linear.pt", "colbert_linear.pt")
# For how long a text a model without absolute positions is taken to be trained, where its configuration does not say.
USUAL_LENGTH = 512
# Errors of loading a source that are the fault of the source.
SOURCE_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
    UnpicklingError,
)


class ConvertedError(OptionError):
    """The source is an LSG checkpoint already, and nothing says what becomes of its global tokens."""


class Source:
    """A model to convert: its configuration and its tokenizer are read at once, its weights by `load`.

    Attributes:
        options: what was asked for.
        folder: where its files are.
        revision: its commit on the Hub, or None where it is a folder of the user's.
        files: its weight files; empty until `load` has found them.
        family, lsg_class: its family, and the LSG class that it becomes.
        is_lsg: whether it is an LSG checkpoint already.
        model_class: the class that loads its weights: LSG where it is LSG already, else stock.
        is_colbert: whether it is a ColBERT checkpoint, which has a projection beside the weights of a base model.
        drops_decoder: whether it has a decoder, and what it becomes has none.
        has_own_head: whether `config.json` names that class, so that the files must hold the head's weights too.
        config: its configuration, of the LSG or stock class likewise.
        tokenizer: None where it has none.
        positions: how many tokens it can read; without absolute positions, those that its configuration names.
        computes_positions: whether no table of trained positions says so.
        is_decoder: whether what it becomes is a decoder alone.
        special_positions: how many rows of its position tables stand before the first position.
        first_id, other_id: the token that the first global token starts from, and the one of the others; None where the
            vocabulary lacks it. A dry run sets neither.
        warnings: what its user should know.
    """

    def __init__(self, options: ConversionOptions) -> None:
        name = options.initial_model
        self.options = options
        self.folder, self.revision = locate(options)
        content = read_config(options, self.folder)
        named = content.get("architectures") or []
        self.family = families.family(content["model_type"])
        self.is_lsg = content.pop("base_model_prefix", None) == "lsg" or any(item.startswith("LSG") for item in named)
        wanted = [flag for flag in GLOBAL_TOKEN_FLAGS if getattr(options, flag)]
        if wanted and not self.is_lsg:
            raise OptionError(f"--{wanted[0]}: {name!r} is no LSG checkpoint; leave the flag out")
        if self.is_lsg and not wanted:
            raise ConvertedError(
                f"--initial_model: {name!r} is an LSG checkpoint already; say what becomes of its global tokens: "
                "--resize_lsg keeps them, --keep_first_global_token keeps the first, --rebuild_global_tokens keeps none"
            )
        if options.architecture is None and not named:
            raise SourceError(
                f"--initial_model: config.json of {name!r} names no architecture; "
                f"give --architecture one of {', '.join(self.family.architectures)}"
            )
        if content.get("quantization_config"):
            raise SourceError(f"--initial_model: {name!r} is quantized; give the model that it was made from")
        if options.architecture is None and named[0].removeprefix("LSG") not in self.family.architectures:
            raise SourceError(
                f"--initial_model: config.json of {name!r} names the class {named[0]!r}, which the family "
                f"{self.family.model_type!r} lacks; give --architecture one of {', '.join(self.family.architectures)}"
            )
        self.lsg_class = self.family.lsg_class(options.architecture or named[0])
        self.model_class = self.lsg_class if self.is_lsg else families.stock_class(self.lsg_class)
        if self.family.is_causal(self.lsg_class):
            content["is_decoder"] = True
        elif self.family.is_decoder(self.lsg_class):
            decoder = families.stock_class(self.lsg_class).__name__
            raise OptionError(f"--architecture: {decoder} is a decoder alone, which has no LSG; give one that encodes")
        self.is_colbert = named == ["HF_ColBERT"]
        self.has_own_head = self.model_class.__name__ in named
        own = next((self.family.architectures.get(item.removeprefix("LSG")) for item in named), None)
        self.drops_decoder = self.family.is_encoder(self.lsg_class) and not (own and self.family.is_encoder(own))
        config_class = self.family.config_class if self.is_lsg else families.stock_class(self.family.config_class)
        try:
            self.config = config_class.from_dict(content)
        except (StrictDataclassError, *SOURCE_FAULTS) as error:
            raise SourceError(
                f"--initial_model: config.json of {name!r}: {first_line(error.__cause__ or error)}; correct it"
            ) from error
        base_class = self.family.base_class
        reader = getattr(base_class, "lsg_part_class", base_class)
        check_padding(name, self.config, needed=reader.positions_follow_padding)
        absolute, counted = self.family.config_class.absolute_positions, base_class.counted_positions(self.config)
        if absolute and self.config.max_position_embeddings <= counted:
            raise SourceError(
                f"--initial_model: config.json of {name!r}: max_position_embeddings is "
                f"{self.config.max_position_embeddings}; correct it to at least {counted + 1}"
            )
        if absolute:
            self.positions = self.config.max_position_embeddings - counted
        else:
            self.positions = getattr(self.config, "n_positions", None) or USUAL_LENGTH
        self.special_positions = base_class.special_positions(self.config)
        rotary = getattr(self.config, "position_embedding_type", None) == "rotary"
        computed = self.family.config_class.sinusoidal_positions or not absolute
        self.computes_positions = rotary or computed or not getattr(self.config, "position_biased_input", True)
        causal = self.family.config_class.has_causal_form and self.config.is_decoder
        self.is_decoder = causal or self.family.is_decoder(self.lsg_class)
        self.warnings: list[str] = []
        self.files: list[Path] = []
        if content.get("auto_map") and not self.is_lsg:
            self.warnings.append("the source has code of its own, which was not run and is not copied")
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if not options.dry_run:  # which has the configuration alone
            self.tokenizer = read_tokenizer(name, self.folder, options.trust_remote_code)
            self.first_id = self._token_id("bos", "cls")
            self.other_id = self._token_id("mask")

    def _token_id(self, *kinds: str) -> int | None:
        for kind in kinds:
            index = getattr(self.tokenizer, f"{kind}_token_id", None)
            if index is not None and 0 <= index < self.config.vocab_size:
                return index
        self.warnings.append(
            f"the source has no {' or '.join(kind.upper() for kind in kinds)} token in its vocabulary: "
            "global tokens start from the mean word embedding instead"
        )
        return None

    @property
    def prefix(self) -> str:
        """What the names of the weights begin with that are those of the model without a head."""
        return f"{self.lsg_class.base_model_prefix}." if self.family.holds_model(self.lsg_class) else ""

    def headless(self, model: PreTrainedModel) -> Any:
        """The loaded source without its head. T5's has no such part: then one is made of what it holds."""
        lsg_class = self.family.headless(self.lsg_class)
        if self.prefix or self.lsg_class is lsg_class:
            return model.base_model
        with torch.device("meta"):
            result = (lsg_class if self.is_lsg else families.stock_class(lsg_class))(model.config)
        for name, _ in list(result.named_children()):
            setattr(result, name, getattr(model, name))
        return result

    def names(self) -> list[str]:
        """The names of its files, as `folder/name` where they are in one; what lies deeper may stand for its folder."""
        if self.revision is not None:
            try:
                return HfApi(token=self.options.hub_token).list_repo_files(
                    self.options.initial_model, revision=self.revision
                )
            except Exception:  # of the Hub's client and of the connection; the conversion needs no list
                self.warnings.append("the Hub did not list the files of the source: those not downloaded are not named")
        paths = [path for path in self.folder.glob("*") if path.is_file()]
        return [path.relative_to(self.folder).as_posix() for path in (*paths, *self.folder.glob("*/*"))]

    def load(self) -> tuple[PreTrainedModel, list[str], list[str]]:
        """The model on the CPU, the names of weights that are new in it, and those of the source's that it leaves out.

        A second call reads the files anew, and does not examine their values again.

        Raises:
            SourceError: where a weight is damaged, missing, not finite, of another shape, or of another family.
        """
        name = self.options.initial_model
        is_first = not self.files
        if is_first:
            files = weight_files(self.folder, self.options.allow_pickle)
            examine(files)
            self.files = list(files)
        is_pickled = self.files[0].suffix == ".bin"
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.seed)
                model, info = self.model_class.from_pretrained(
                    self.folder,
                    config=copy.deepcopy(self.config),
                    dtype=self.options.dtype,
                    use_safetensors=not is_pickled,
                    weights_only=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except SOURCE_FAULTS as error:
            raise SourceError(
                f"--initial_model: the weights of {name!r} cannot be loaded: {first_line(error)}; "
                "they must be complete, and those of the class that config.json names"
            ) from error
        if is_first and is_pickled:  # safetensors were examined before they were loaded
            for key, tensor in model.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise SourceError(f"--initial_model: {name!r}: the weight {key} has values that are not finite")
        shapes = {key: (tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"]}
        new = sorted({*info["missing_keys"], *shapes})
        global_table = self.prefix + self.family.base_class.global_table
        if self.options.rebuild_global_tokens:  # it is not used
            new = [key for key in new if key != global_table]
        parts = tuple(f"{part}." for part, _ in self.headless(model).named_children())
        needed = [
            key for key in new if self.has_own_head or key.startswith(tuple(self.prefix + part for part in parts))
        ]
        for key in needed:
            if key in shapes:
                found, expected = shapes[key]
                advice = "--rebuild_global_tokens makes a new one" if key == global_table else "correct one of them"
                raise SourceError(
                    f"--initial_model: {name!r}: the weight {key} has the shape {found}, and by config.json it "
                    f"has {expected}; {advice}"
                )
        # Checkpoints often lack the pooler, where their head does not use it.
        made_up = [key for key in needed if "pooler." not in key]
        if made_up:
            raise SourceError(f"--initial_model: {name!r} lacks weights: {', '.join(made_up[:3])}; restore its files")
        dropped = sorted(key for key in info["unexpected_keys"] if not key.endswith(("position_ids", "token_type_ids")))
        if self.drops_decoder:
            dropped = [key for key in dropped if not key.startswith("decoder.")]
        prefix = f"{model.base_model_prefix}."
        foreign = [key for key in dropped if key.removeprefix(prefix).startswith(parts) and "pooler." not in key]
        if foreign:
            raise SourceError(
                f"--initial_model: {name!r} has weights that {self.model_class.__name__} lacks: "
                f"{', '.join(foreign[:3])}; where config.json names a wrong family, give --model_type"
            )
        return model, new, dropped

    def global_words(self, model: PreTrainedModel) -> torch.Tensor:
        """The word part of the global rows, shape (512, embedding width)."""
        return surgery.global_words(
            model.get_input_embeddings().weight.detach(),  # type: ignore[operator]
            self.first_id,
            self.other_id,
            self.options.seed if self.options.random_global_init else None,
        )

    def token_type(self, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The embedding of token type 0, and of what else a family has types of; None where global rows have none."""
        base_class = self.family.base_class
        names = ["token_type"] if self.options.use_token_ids and base_class.global_token_type else []
        tables = [f"{self.prefix}embeddings.{name}_embeddings.weight" for name in (*names, *base_class.global_types)]
        rows = [state[table][0].float() for table in tables if table in state]
        return torch.stack(rows).sum(dim=0) if rows else None

    def global_positions(self, model: PreTrainedModel) -> torch.Tensor | None:
        """The trained rows of positions from which global tokens start, (positions, width): a zero where the family has
        no table of them, or no positions. None where the model has no part that has LSG."""
        base_class, tables = self.family.base_class, self.tables(model)
        holder = self.prefix + base_class.global_table.removesuffix("global_embeddings.weight")
        if not any(name.startswith(holder) for name in tables):
            return None
        table = next((tables.get(self.prefix + name) for name in base_class.position_tables), None)
        if table is None:
            words: Any = model.get_input_embeddings()
            return torch.zeros_like(words.weight[:1])
        return table[self.special_positions :]

    def tables(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The weights of a model, and the tables that it computes, which no file holds."""
        return {**dict(model.named_buffers()), **model.state_dict()}


def locate(options: ConversionOptions) -> tuple[Path, str | None]:
    """The folder of a source, downloaded where it is on the Hub, and then its commit there, else None.

    Raises:
        SourceError: where there is no such model.
        OptionError: where a revision is given with a folder.
    """
    name, folder = options.initial_model, Path(options.initial_model).expanduser()
    if folder.exists():
        if options.revision:
            raise OptionError(f"--revision: got it with the folder {name!r}; leave it out, or give a name on the Hub")
        if folder.is_file():
            raise SourceError(f"--initial_model: {name!r} is a file; give the folder that a model was saved to")
        if not (folder / "config.json").is_file():
            raise SourceError(f"--initial_model: {name!r} has no config.json; give a folder that a model was saved to")
        return folder, None
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SourceError(
            f"--initial_model: there is no folder {name!r}, and no model on the Hub has such a name; correct the path"
        ) from None
    download = partial(
        snapshot_download, name, revision=options.revision, token=options.hub_token, cache_dir=options.cache_dir
    )
    patterns = ["config.json"]
    if not options.dry_run:
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICEN[CS]E*", "NOTICE*", "*.safetensors"]
        patterns += [*TOKENIZER_FILES, "bpe.codes", COLBERT_SETTINGS]
        patterns += ["*.py"] if options.trust_remote_code else []
    try:
        snapshot = Path(download(allow_patterns=patterns, ignore_patterns=list(OTHER_FORMATS)))
        if not options.dry_run and (pickles := pickles_of(snapshot, options.allow_pickle)):
            download(allow_patterns=pickles)
    except SOURCE_FAULTS as error:
        raise SourceError(
            f"--initial_model: {name!r} is no folder here, and the Hub gave no such model: {refusal(error)}"
        ) from None  # what the Hub's client raised may hold the token
    if not (snapshot / "config.json").is_file():
        raise SourceError(f"--initial_model: {name!r} has no config.json on the Hub; give the name of a model")
    return snapshot, snapshot.name


def refusal(error: BaseException) -> str:
    """Why the Hub gave no model, and what to do."""
    reasons = {
        GatedRepoError: "its owner grants access; ask for it on its page, and log in (`hf auth login`)",
        RepositoryNotFoundError: "it has none of that name, or a private one; correct the name, or log in to see it",
        RevisionNotFoundError: "it has no such revision of it; correct --revision",
        LocalEntryNotFoundError: "it was not reached, and the cache lacks the model; check the connection",
    }
    known = (reason for kind, reason in reasons.items() if isinstance(error, kind))
    return next(known, f"{first_line(error)}; check the name, the connection and your access")


def pickles_of(snapshot: Path, allowed: bool) -> list[str]:
    """The names of pickles that may be on the Hub beside what was downloaded.

    Those of modules are fetched without the flag too, and not opened then: so it is seen that one needs them.
    """
    modules = [name for name, _ in read_modules(snapshot) if name]
    pickles = [f"{name}/*.bin" for name in modules if not list((snapshot / name).glob("*.safetensors"))]
    if allowed:
        pickles += PICKLED_HEADS
        pickles += [] if list(snapshot.glob("*.safetensors")) else ["pytorch_model*.bin"]
    return pickles


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """The folder and the type of each module of sentence-transformers; none where modules.json is absent or damaged."""
    try:
        content = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return [(str(item["path"]), str(item["type"])) for item in content]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_config(options: ConversionOptions, folder: Path) -> dict[str, Any]:
    """The content of `config.json`, with the `model_type` of the options where they give one.

    Raises:
        SourceError: where it is damaged, or names no family.
        OptionError: where the options name an unknown one.
    """
    config, known = read_json(folder / "config.json"), ", ".join(families.model_types())
    got = f"--initial_model: config.json of {options.initial_model!r}"
    if options.model_type is not None:
        if options.model_type not in families.model_types():
            raise OptionError(f"--model_type: got {options.model_type!r}; give one of {known}")
        config["model_type"] = options.model_type
    kind = config.get("model_type")
    if not isinstance(kind, str):
        fault = "names no model_type" if kind is None else f"has {kind!r} as its model_type"
        raise SourceError(f"{got} {fault}; give --model_type one of {known}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(item, str) for item in names)):
        raise SourceError(f'{got} has {names!r} as its architectures; correct it to a list of names, ["BertModel"]')
    return config


def check_padding(name: str, config: Any, *, needed: bool) -> None:
    """Raise SourceError where no model can have the padding id; `needed` is whether positions are counted from it."""
    padding, words = config.pad_token_id, config.vocab_size
    if padding is None and needed:
        fault = f"null, and a {config.model_type} counts its positions from it"
    elif padding is not None and not (0 if needed else -words) <= padding < words:
        fault = f"{padding}, which is not among its {words} tokens"
    else:
        return
    raise SourceError(
        f"--initial_model: config.json of {name!r}: pad_token_id is {fault}; correct it to the id of the padding token"
    )


def read_tokenizer(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, or None where it has none. Raises SourceError."""
    kinds = (".model", ".spm")  # of the library sentencepiece
    files = sorted(
        path for path in folder.iterdir() if path.suffix in kinds or path.name.startswith(("tokenizer", "vocab"))
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Without their files, Transformers makes up a tokenizer that knows hardly more than its special tokens.
        named = {*tokenizer.vocab_files_names.values()}
        found = {*(path.name for path in files), *(name for name in named if (folder / name).is_file())}
        made_up = named and not found - {"tokenizer_config.json"}
        return None if made_up or len(tokenizer) <= len(tokenizer.all_special_ids) else tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception
        for path in files:
            if path.suffix == ".json":
                read_json(path)  # which says that it is this one, where it is
        if files:
            missing = any(path.suffix in kinds for path in files) and find_spec("sentencepiece") is None
            advice = "pip install sentencepiece" if missing else "repair its files, or remove them"
            raise SourceError(
                f"--initial_model: the tokenizer of {name!r} cannot be loaded: {first_line(error)}; {advice}"
            ) from error
        return None
