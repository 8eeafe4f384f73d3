"""Encode a corpus that is larger than memory, by several processes, and go on where it was stopped.

Texts are read from a .jsonl file line by line. Vectors are written shard by shard, each file complete or absent:
`00000.npy` has those of the first `--shard_size` texts, shape (texts, width), and so on. What is there is not made
again. The processes are sentence-transformers' own pool; on several machines, give each a part of the file.

    python experiments/retrieval/encode.py --model lsg-minilm --trust_remote_code --texts texts.jsonl \\
        --devices cpu cpu --output out/vectors
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import HF_MODULES_CACHE


sys.path.append(str(Path(__file__).parents[1]))

import common


@dataclass
class CorpusArguments:
    """What is encoded, with what."""

    model: str = field(metadata={"help": "A sentence model: a folder, or a name on the Hub."})
    texts: str = field(metadata={"help": "A .jsonl file with a text in each line."})
    output: str = common.flag("The folder of vectors.", "out/vectors")
    trust_remote_code: bool = common.flag("Run the LSG code that lies beside the weights.", False)
    text_column_name: str = common.flag("The column of texts.", "text")
    batch_size: int = common.flag("Texts that a process reads at once.", 8)


@dataclass
class EncodeArguments(CorpusArguments):
    """How the work is shared."""

    shard_size: int = common.flag("Texts whose vectors are in one file.", 1024)
    devices: list[str] = common.flag("A process for each, such as cuda:0 cuda:1, or cpu cpu.", ["cpu"])


def read(options: EncodeArguments) -> Iterator[str]:
    """The texts, one after the other. Raises OptionError."""
    try:
        with open(options.texts, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)[options.text_column_name]
    except (*common.FAULTS, json.JSONDecodeError) as error:
        raise common.OptionError(f"--texts: {options.texts!r}: {common.first_line(error)}") from error


def load(options: CorpusArguments, device: str, *counts: str) -> Any:
    """The model, once the flags are found right; `counts` are those that must be 1 or more. Raises OptionError."""
    for name in counts:
        if getattr(options, name) < 1:
            raise common.OptionError(f"--{name}: got {getattr(options, name)}; give 1 or more")
    if not Path(options.texts).exists():
        raise common.OptionError(f"--texts: there is no file {options.texts!r}")
    library = common.need("sentence_transformers")
    try:
        return library.SentenceTransformer(options.model, device=device, trust_remote_code=options.trust_remote_code)
    except common.FAULTS as error:
        raise common.OptionError(f"--model: {options.model!r}: {common.first_line(error)}") from error


def claim(options: EncodeArguments, folder: Path) -> None:
    """Make the folder one of these texts and this model. Raises OptionError where it is another's."""
    content = {name: value for name, value in asdict(options).items() if name in ("model", "texts", "shard_size")}
    content["bytes"] = Path(options.texts).stat().st_size
    mark = folder / "encode.json"
    if mark.is_file() and (found := json.loads(mark.read_text())) != content:
        raise common.OptionError(f"--output: {str(folder)!r} has vectors of {found}; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(content) + "\n")


@contextmanager
def pool(model: Any, devices: list[str]) -> Iterator[Any]:
    """The library's processes; none where a single device needs none."""
    if len(devices) == 1:
        yield None
        return
    # A new process unpickles the model, whose class is in the code that came with it.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HF_MODULES_CACHE, before]))
    processes = model.start_multi_process_pool(devices)
    try:
        yield processes
    finally:
        model.stop_multi_process_pool(processes)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@common.command
def main(flags: Sequence[str]) -> None:
    (options,) = common.parse_flags([EncodeArguments], flags)
    model = load(options, options.devices[0], "batch_size", "shard_size")
    folder = Path(options.output)
    claim(options, folder)
    texts, made = read(options), 0
    with pool(model, options.devices) as processes:
        for number in count():
            shard = list(islice(texts, options.shard_size))
            if not shard:
                break
            path = folder / f"{number:05}.npy"
            if path.is_file():
                continue
            vectors = model.encode_document(shard, batch_size=options.batch_size, pool=processes)
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                np.save(file, vectors)
            temporary.replace(path)
            made += 1
            print(f"{path}: {len(shard)} texts", flush=True)
    print(f"{made} files were written, {number - made} were there")


if __name__ == "__main__":
    sys.exit(main())
