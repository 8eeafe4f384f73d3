"""What a conversion did: for a person, for a script, and beside the weights."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj

from .options import ConversionOptions
from .verify import Check, HeadRun
from .version import package_version


FILE_NAME = "lsg_conversion.json"


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        options: what was asked for.
        source: the source's name on the Hub, or that of its folder; it stands in files, so it is no path.
        revision: the source's commit on the Hub.
        model_type, architecture: the family, and the class of the written model.
        auto_class: the class of Transformers that loads it.
        lsg: the LSG fields of its configuration.
        source_positions, positions: tokens that the source could read, and that the written model can.
        absolute_positions: whether there are positions that end there, and not distances alone.
        changed: what is not the source's, in words.
        has_tokenizer: whether a tokenizer was written.
        sentence_class: the class of sentence-transformers that loads it, where it has modules of theirs.
        new_weights, dropped_weights: names of weights that a change of head made or left out.
        left_out: files and folders of the source that are not in the target.
        warnings: what a user should know.
        advice: options that may suit the source better.
        checks: what was verified, from disk.
        heads: what `run_test` ran.
        source_files, files: the SHA-256 of the source's weights and configuration, and of what was written.
        pushed_to: the repository that it was pushed to.
    """

    options: ConversionOptions
    source: str
    revision: str | None
    model_type: str
    architecture: str
    auto_class: str
    lsg: dict[str, Any]
    source_positions: int
    positions: int
    absolute_positions: bool = True
    changed: list[str] = field(default_factory=list)
    has_tokenizer: bool = False
    sentence_class: str | None = None
    new_weights: list[str] = field(default_factory=list)
    dropped_weights: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    heads: list[HeadRun] = field(default_factory=list)
    source_files: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    pushed_to: str | None = None

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        result = {name: value for name, value in asdict(self).items() if name != "options"}
        packages = ("lsg-converter", "transformers", "torch", "safetensors")
        return {
            **result,
            "options": self.options.changed(),
            "versions": {name: package_version(name) for name in packages},
        }

    def write(self, folder: Path) -> None:
        """Write `lsg_conversion.json`. Without seconds: two equal conversions write equal bytes."""
        text = json.dumps(without_seconds(self.content()), indent=2, sort_keys=True)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def without_seconds(value: Any) -> Any:
    """`value` without what a clock said, or a place outside."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("seconds", "_s")) and k != "pushed_to"}
        return {name: without_seconds(item) for name, item in kept.items()}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def hashes(folder: Path, files: list[Path]) -> dict[str, str]:
    """The SHA-256 of files in `folder`, by their names in it."""
    result = {}
    for path in sorted(files):
        with path.open("rb") as file:
            result[path.relative_to(folder).as_posix()] = sha_fileobj(file).hex()
    return result
