"""What can be asked of a conversion: one dataclass is the API's arguments and the command's flags."""

import ast
from dataclasses import dataclass, field
from typing import Any


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


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """The arguments of a conversion; each is a flag of the command, and the help texts say what they mean.

    Raises:
        OptionError: where a value is not allowed.
    """

    initial_model: str = field(metadata=_help("The model to convert: a name on the Hugging Face Hub, or a folder."))
    model_name: str = field(metadata=_help("The folder to write. It must not exist yet."))
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
    resize_lsg: bool = field(
        default=False, metadata=_help("The source is an LSG checkpoint: keep its global tokens, resize its positions.")
    )
    keep_first_global_token: bool = field(
        default=False,
        metadata=_help("The source is an LSG checkpoint: keep its first global token, rebuild the others."),
    )
    allow_pickle: bool = field(
        default=False,
        metadata=_help("Load pickled weights where there are no safetensors, without running their code."),
    )
    run_test: bool = field(
        default=False, metadata=_help("Run every head of the written checkpoint on long inputs, and print a table.")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_kwargs", parse_literals(self.model_kwargs))
        for name in ("initial_model", "model_name"):
            if not getattr(self, name):
                raise OptionError(f"--{name}: got an empty string; give a name or a folder")
        if self.resize_lsg and self.keep_first_global_token:
            raise OptionError("--resize_lsg: got --keep_first_global_token as well; give one of them")
        if self.max_sequence_length < 1:
            raise OptionError(
                f"--max_sequence_length: got {self.max_sequence_length}; give a number of tokens, at least 1"
            )
        if self.global_positional_stride < 1 or 512 % self.global_positional_stride:
            raise OptionError(
                f"--global_positional_stride: got {self.global_positional_stride}; give a power of two from 1 to 512"
            )


def parse_literals(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dictionary from JSON or Python literals, or a mixture of both; nothing is evaluated.

    Raises:
        OptionError: where it is something else.
    """
    if value is None:
        return {}
    if isinstance(value, dict):
        return dict(value)
    error = OptionError(
        f"--model_kwargs: got {value!r}; give a dictionary of literals, such as \"{{'block_size': 64}}\""
    )
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
