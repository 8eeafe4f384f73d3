"""Reading a source safely, and writing a target that is complete or absent."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import families, surgery
from .options import ConversionOptions, OptionError, SourceError, TargetError


# What loading a source raises where the source is at fault.
SOURCE_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    UnpicklingError,
)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:;")


class Source:
    """A model to convert: its configuration and its tokenizer are read at once, its weights by `load`.

    Attributes:
        options: what is to be done with it.
        family, lsg_class: what it is, and the class that it becomes.
        is_lsg: whether it is an LSG checkpoint already.
        config: its configuration, of its family's stock class, or LSG class where it is LSG.
        tokenizer: None where it has none.
        positions: how many tokens it can read.
        warnings: what its user should know.
    """

    def __init__(self, options: ConversionOptions) -> None:
        name = options.initial_model
        content = read_config(name)
        named = content.get("architectures") or []
        self.options = options
        self.family = families.family(options.model_type or content["model_type"])
        self.is_lsg = content.pop("base_model_prefix", None) == "lsg" or any(item.startswith("LSG") for item in named)
        if not self.is_lsg and (options.resize_lsg or options.keep_first_global_token):
            flag = "resize_lsg" if options.resize_lsg else "keep_first_global_token"
            raise OptionError(f"--{flag}: {name!r} is no LSG checkpoint; leave the flag out")
        if options.architecture is None and not named:
            raise OptionError(
                f"--architecture: config.json of {name!r} names none; "
                f"give one of {', '.join(self.family.architectures)}"
            )
        self.lsg_class = self.family.lsg_class(options.architecture or named[0])
        self.model_class = self.lsg_class if self.is_lsg else families.stock_class(self.lsg_class)
        self.has_own_head = self.model_class.__name__ in named
        config_class = self.family.config_class if self.is_lsg else families.stock_class(self.family.config_class)
        try:
            self.config = config_class.from_dict({**content, "model_type": self.family.model_type})
        except (StrictDataclassError, *SOURCE_FAULTS) as error:
            raise SourceError(
                f"--initial_model: config.json of {name!r}: {first_line(error.__cause__ or error)}; correct it"
            ) from error
        base_class = self.family.base_class
        self.positions = self.config.max_position_embeddings - base_class.counted_positions(self.config)
        self.special_positions = base_class.special_positions(self.config)
        self.tokenizer = read_tokenizer(name)
        self.warnings: list[str] = []
        if self.is_lsg and not (options.resize_lsg or options.keep_first_global_token):
            self.warnings.append("the source's own global tokens are rebuilt; --resize_lsg keeps them")
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
        """What the names of the base model's weights begin with."""
        return "" if self.lsg_class is self.family.base_class else f"{self.lsg_class.base_model_prefix}."

    def load(self) -> tuple[PreTrainedModel, list[str], list[str]]:
        """The model on CPU, in the dtype of its weights, and the names of its new and of dropped weights.

        Raises:
            SourceError: where a weight cannot be read, or is absent and would be made up.
        """
        name = self.options.initial_model
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.seed)
                model, info = self.model_class.from_pretrained(
                    name,
                    config=copy.deepcopy(self.config),
                    dtype="auto",
                    use_safetensors=None if self.options.allow_pickle else True,
                    weights_only=True,
                    output_loading_info=True,
                )
        except SOURCE_FAULTS as error:
            raise SourceError(
                f"--initial_model: the weights of {name!r} cannot be loaded: {first_line(error)}; "
                "they must be complete, in safetensors, and of the shapes that config.json says"
            ) from error
        new = sorted(info["missing_keys"])
        # A pooler is often left out where nobody reads it.
        made_up = [key for key in new if "pooler." not in key and (self.has_own_head or key.startswith(self.prefix))]
        if made_up:
            raise SourceError(f"--initial_model: {name!r} lacks weights: {', '.join(made_up[:3])}; restore its files")
        dropped = sorted(key for key in info["unexpected_keys"] if not key.endswith(("position_ids", "token_type_ids")))
        parts = tuple(f"{part}." for part, _ in getattr(model, model.base_model_prefix, model).named_children())
        foreign = [key for key in dropped if key.removeprefix(f"{model.base_model_prefix}.").startswith(parts)]
        foreign = [key for key in foreign if "pooler." not in key]
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
        """The embedding of token type 0, where global rows carry it."""
        if not (self.options.use_token_ids and self.family.base_class.global_token_type):
            return None
        return state[f"{self.prefix}embeddings.token_type_embeddings.weight"][0]


def read_config(source: str) -> dict[str, Any]:
    """The content of `config.json` of a folder or a model on the Hub. Raises SourceError."""
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SourceError(f"--initial_model: {source!r} has no config.json; give a folder that a model was saved to")
    try:
        if folder.exists():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        else:
            config, _ = PreTrainedConfig.get_config_dict(source)
    except SOURCE_FAULTS as error:
        if folder.exists():
            raise SourceError(f"{folder / 'config.json'}: it is no JSON: {first_line(error)}; correct it") from error
        raise SourceError(
            f"--initial_model: {source!r} is no folder here, and the Hub gave no such model ({first_line(error)}); "
            "check the name, the connection and your access"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(
            f"--initial_model: config.json of {source!r} names no model_type; add the family's name to it"
        )
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise SourceError(
            f"--initial_model: config.json of {source!r}: architectures is {names!r}; it must be a list of names"
        )
    return config


def read_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, or None where it has none; its own code is not run. Raises SourceError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # Where there are no files, Transformers makes up a tokenizer that knows its special tokens alone.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
    except Exception as error:  # the tokenizers library raises no narrower one
        folder = Path(source)
        if folder.exists() and any(path.name.startswith(("tokenizer", "vocab", "spiece")) for path in folder.iterdir()):
            raise SourceError(
                f"--initial_model: the tokenizer of {source!r} cannot be loaded: {first_line(error)}; "
                "repair its files, or remove them"
            ) from error
        return None


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_sequence_length: int) -> None:
    """Save `tokenizer` for texts of `max_sequence_length` tokens."""
    tokenizer.model_max_length = max_sequence_length
    tokenizer.init_kwargs.pop("auto_map", None)  # code of the source's own, which was not run and does not travel along
    if tokenizer.is_fast:
        # A truncation to the old length, stored in tokenizer.json, would cut what others read with that file.
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)


@contextmanager
def staged(target: str) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end; on any error nothing is left. Raises TargetError."""
    path = Path(target).absolute()
    if os.path.lexists(path):
        raise TargetError(f"--model_name: {target!r} exists; give another name, or remove it")
    ancestor = next(parent for parent in path.parents if parent.exists())
    try:
        # On the same disk, so that the last step is a rename; of the same name, which modules are cached under.
        stage = Path(tempfile.mkdtemp(prefix=".lsg-", dir=ancestor))
    except OSError as error:
        raise TargetError(
            f"--model_name: {target!r} cannot be written: {error.strerror}; give another place"
        ) from error
    try:
        folder = stage / path.name
        folder.mkdir()
        yield folder
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(path)
        except OSError as error:
            raise TargetError(f"--model_name: {target!r} cannot be written: {error.strerror}; try again") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
