"""What can be asked of a conversion: one dataclass is the API's arguments and the command's flags."""

import ast
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


# Positions above this are surely a slip of the pen: the tables alone would fill a machine's memory.
MAX_SEQUENCE_LENGTH = 2**24
# What becomes of the global tokens of a source that is LSG already: one of these.
GLOBAL_TOKEN_FLAGS = ("resize_lsg", "keep_first_global_token", "rebuild_global_tokens")
_TYPE_NAMES = {int: "a whole number", bool: "true or false", str: "a text", dict: "a dictionary", type(None): "none"}


class ConversionError(Exception):
    """A conversion that cannot be done. Its message is one line: `<flag or file>: <what was got>; <what to do>`."""

    exit_code = 1


class OptionError(ConversionError):
    exit_code = 2


class SourceError(ConversionError):
    exit_code = 3


class TargetError(ConversionError):
    exit_code = 4


class VerificationError(ConversionError):
    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a message of one line."""
    if isinstance(error, KeyError):
        return f"unknown is {error}"
    # Of a field that may have several types, Transformers tells each by its class, and all of it again for each.
    text = re.sub(r"<class '(\w+)'>", r"\1", str(error).strip().split(". Errors: ")[0])
    return (text or type(error).__name__).splitlines()[0].rstrip(".:;")


def _help(text: str, *aliases: str) -> dict[str, Any]:
    return {"help": text, "aliases": list(aliases)}


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """The arguments of a conversion; each is a flag of the command, and the help texts say what they mean.

    Raises:
        OptionError: where a value is not allowed.
    """

    initial_model: str = field(metadata=_help("The model to convert: a name on the Hugging Face Hub, or a folder."))
    model_name: str = field(metadata=_help("The folder to write."))
    max_sequence_length: int = field(default=4096, metadata=_help("Tokens that the converted model can read."))
    architecture: str | None = field(
        default=None, metadata=_help("The class to convert to, such as BertForMaskedLM; the source's own unless given.")
    )
    model_type: str | None = field(
        default=None, metadata=_help("The family, such as mbart, where the source's config.json names a wrong one.")
    )
    # The flag is read as text; the API takes a dictionary as well.
    model_kwargs: dict | str | None = field(
        default=None,
        metadata=_help(
            "LSG fields of the configuration, in JSON or Python: \"{'block_size': 64, 'sparsity_type': 'lsh'}\"."
        ),
    )
    random_global_init: bool = field(
        default=False,
        metadata=_help(
            "Draw the word part of the global tokens, but for the first, from the word embeddings' distribution."
        ),
    )
    global_positional_stride: int = field(
        default=64, metadata=_help("Distance of the positions that successive global tokens start from.")
    )
    use_token_ids: bool = field(
        default=True, metadata=_help("Add token type 0 to the global tokens, where the family has token types.")
    )
    seed: int = field(default=123, metadata=_help("Seed of what is drawn at random: global tokens, a new head."))
    exact: bool = field(
        default=False,
        metadata=_help(
            "Give for every text that the source can read what the source gives: no global tokens, and full attention "
            "up to the source's length."
        ),
    )
    resize_lsg: bool = field(
        default=False, metadata=_help("The source is an LSG checkpoint: keep its global tokens, resize its positions.")
    )
    keep_first_global_token: bool = field(
        default=False,
        metadata=_help("The source is an LSG checkpoint: keep its first global token, rebuild the others."),
    )
    rebuild_global_tokens: bool = field(
        default=False, metadata=_help("The source is an LSG checkpoint: rebuild all its global tokens.")
    )
    position_init: Literal["tile", "interpolate", "stretch"] = field(
        default="tile",
        metadata=_help(
            "Repeat the trained positions (tile), or put others between them: for every text (interpolate), or for "
            "those that are longer than the source's positions (stretch)."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=_help("The dtype of the written weights; auto is the source's own.")
    )
    export: Literal["none", "onnx"] = field(
        default="none",
        metadata=_help("Write an ONNX graph of the encoder too, in onnx/, right at every length."),
    )
    revision: str | None = field(
        default=None, metadata=_help("The branch, tag or commit of a source on the Hub; its main branch unless given.")
    )
    token: str | None = field(
        default=None,
        repr=False,
        metadata=_help("A token for the Hub; the one that you logged in with unless given.", "--use_auth_token"),
    )
    cache_dir: str | None = field(default=None, metadata=_help("Where downloads are kept."))
    trust_remote_code: bool = field(
        default=False, metadata=_help("Run the source's own code, where its tokenizer needs it.")
    )
    allow_pickle: bool = field(
        default=False,
        metadata=_help(
            "Load pickled weights where there are no safetensors, without running their code; copy those of modules."
        ),
    )
    overwrite: bool = field(
        default=False, metadata=_help("Replace the checkpoint that --model_name names, once the new one is complete.")
    )
    push_to_hub: bool = field(
        default=False, metadata=_help("Push the written checkpoint to the Hub, under the name of its folder.")
    )
    hub_model_id: str | None = field(
        default=None, metadata=_help("The repository to push to, such as me/lsg-bert, where it has another name.")
    )
    private: bool = field(default=False, metadata=_help("Make the repository that is pushed to a private one."))
    no_verify: bool = field(default=False, metadata=_help("Do not verify what was written."))
    dry_run: bool = field(
        default=False, metadata=_help("Say what would be done, from the source's config.json alone, and write nothing.")
    )
    run_test: bool = field(
        default=False, metadata=_help("Run every head of the written checkpoint on long inputs, and print a table.")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_kwargs", parse_literals(self.model_kwargs))
        check_types(self)
        for item in fields(self):
            if getattr(self, item.name) == "":
                allowed = wanted(item) if item.default is MISSING else "give a value, or leave it out"
                raise OptionError(f"--{item.name}: got an empty string; {allowed}")
        chosen = [name for name in GLOBAL_TOKEN_FLAGS if getattr(self, name)]
        if len(chosen) > 1:
            raise OptionError(f"--{chosen[0]}: got --{chosen[1]} as well; give one of them")
        if self.exact:
            self._check_exact(chosen)
        if self.max_sequence_length < 1:
            raise OptionError(
                f"--max_sequence_length: got {self.max_sequence_length}; give a number of tokens, at least 1"
            )
        if self.global_positional_stride < 1 or 512 % self.global_positional_stride:
            raise OptionError(
                f"--global_positional_stride: got {self.global_positional_stride}; give a power of two from 1 to 512"
            )
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed: got {self.seed}; give a number from 0 to 2**63 - 1")
        for name in ("private", "hub_model_id"):
            if getattr(self, name) and not self.push_to_hub:
                raise OptionError(f"--{name}: got it without --push_to_hub; give both, or none")
        if self.no_verify and self.run_test:
            raise OptionError("--no_verify: got --run_test as well; give one of them")

    def _check_exact(self, global_token_flags: list[str]) -> None:
        fields = parse_literals(self.model_kwargs)
        for name, allowed in {"num_global_tokens": 0, "mask_first_token": False}.items():
            if fields.get(name, allowed) != allowed:
                raise OptionError(f"--exact: got {name}={fields[name]!r} as well; give {allowed!r}, or leave one out")
        if "full_attention_length" in fields:
            raise OptionError("--exact: got full_attention_length as well, which it sets; give one of them")
        if self.position_init == "interpolate":
            raise OptionError("--exact: got --position_init interpolate as well; give tile or stretch")
        if global_token_flags:
            raise OptionError(f"--exact: got --{global_token_flags[0]}, for an LSG source; give --model_kwargs instead")

    @property
    def hub_token(self) -> str | bool | None:
        """The token as the Hub's client takes it; `--use_auth_token True`, as it was written once, is True."""
        flags: dict[str | None, bool] = {"True": True, "true": True, "False": False, "false": False}
        return flags.get(self.token, self.token)

    def changed(self) -> dict[str, Any]:
        """The options that are not their defaults, but for names of places and the token."""
        hidden = {"initial_model", "model_name", "token", "cache_dir", "hub_model_id", "push_to_hub", "private"}
        hidden |= {"overwrite", "dry_run"}
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in hidden}
        defaults: dict[str, Any] = {
            item.name: {} if item.name == "model_kwargs" else item.default for item in fields(self)
        }
        return {name: value for name, value in values.items() if value != defaults[name]}


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The arguments of `lsg-tune`, which tries settings of a conversion; each is a flag.

    Raises:
        OptionError: where a value is not allowed.
    """

    initial_model: str = field(metadata=_help("The model to convert: a name on the Hugging Face Hub, or a folder."))
    texts: str = field(
        metadata=_help(
            "Your texts: a folder of .txt and .md files, one such file, or a .jsonl file with a `text` in each line."
        )
    )
    max_sequence_length: int = field(
        default=4096, metadata=_help("Tokens that the converted model is to read; texts are cut there.")
    )
    architecture: str | None = field(
        default=None, metadata=_help("The class to convert to, such as BertForMaskedLM; the source's own unless given.")
    )
    minutes: int = field(default=10, metadata=_help("No setting is begun that would not end in so many minutes."))
    max_texts: int = field(default=50, metadata=_help("Use the first so many texts that are long enough."))
    # The flag is read as text; the API takes a dictionary as well.
    grid: dict | str | None = field(
        default=None,
        metadata=_help(
            "The values to try, the first of each as the base, instead of those built in: "
            "\"{'block_size': [128, 32], 'exact': [False]}\"."
        ),
    )
    cross: bool = field(default=False, metadata=_help("Try all combinations, not each value alone and then the best."))
    figure: str | None = field(default=None, metadata=_help("A .png to draw quality against cost to."))

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", parse_literals(self.grid, "grid", "\"{'block_size': [128, 32]}\""))
        check_types(self)
        for name, least in {"max_sequence_length": 1, "minutes": 1, "max_texts": 2}.items():
            if getattr(self, name) < least:
                raise OptionError(f"--{name}: got {getattr(self, name)}; give at least {least}")
        if self.figure is not None and not self.figure.endswith(".png"):
            raise OptionError(f"--figure: got {self.figure!r}; give a name that ends in .png")


def wanted(item: Field[Any]) -> str:
    """What to give for an option that cannot be left out."""
    text = item.metadata["help"]
    return f"give {text[0].lower()}{text[1:].rstrip('.')}"


def check_types(options: object) -> None:
    """Raise OptionError where a field of a dataclass of options has a wrong type."""
    for name, hint in get_type_hints(type(options)).items():
        check_type(name, getattr(options, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise OptionError where an argument has a wrong type."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise OptionError(f"--{name}: got {value!r}; give one of {', '.join(get_args(hint))}")
        return
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        shown = f"a value of type {type(value).__name__}" if name == "token" else repr(value)
        raise OptionError(f"--{name}: got {shown}; give {' or '.join(_TYPE_NAMES[kind] for kind in allowed)}")


def parse_literals(
    value: dict[str, Any] | str | None, flag: str = "model_kwargs", example: str = "\"{'block_size': 64}\""
) -> dict[str, Any]:
    """A dictionary from JSON or Python literals, or a mixture of both; nothing is evaluated.

    Raises:
        OptionError: where it is something else.
    """
    if value is None:
        return {}
    if isinstance(value, dict):
        return dict(value)
    error = OptionError(f"--{flag}: got {value!r}; give a dictionary of literals, such as {example}")
    try:
        tree = ast.parse(value.strip(), mode="eval")
        for node in ast.walk(tree):
            for name, child in ast.iter_fields(node):
                children = child if isinstance(child, list) else [child]
                replaced = [_json_constant(item) for item in children]
                if replaced != children:
                    setattr(node, name, replaced if isinstance(child, list) else replaced[0])
        result = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise error from None
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise error
    return result


def _json_constant(node: Any) -> Any:
    constants = {"true": True, "false": False, "null": None}
    return ast.Constant(constants[node.id]) if isinstance(node, ast.Name) and node.id in constants else node
