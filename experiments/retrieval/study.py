"""Is a converted sentence model better than cutting documents up? Retrieval by all that one could do instead.

Documents are read as their first 512 tokens, in chunks, whole with full attention on the same long positions, and whole
with LSG by its settings; an index keeps one vector of each, one for each chunk or span, or the pooled states of its
tokens; beside them stands BM25. Nothing is trained. What is measured is kept in --output, so a study that was stopped
goes on where it was.

    python experiments/retrieval/study.py --model sentence-transformers/all-MiniLM-L6-v2 --output out/study
"""

import itertools
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers


sys.path.append(str(Path(__file__).parents[1]))

import common
import corpora
import systems
import tables
from systems import POSITION_INIT, Reader, Result, Study

from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES
from lsg_converter.tune import check_figure


READERS = ("bm25", "truncation", "chunks", "full", "lsg")


@dataclass
class StudyArguments:
    """What is measured. The first value of an LSG setting is the base, and the others are tried one at a time."""

    model: str = field(metadata={"help": "A sentence model that is not converted yet: a folder, or a name on the Hub."})
    output: str = common.flag("The folder of the results, the tables and the converted models.", "out/study")
    corpus: str = common.flag(
        "Documents: built-in, a .jsonl file of texts or of queries and documents, or longembed/ and a task.",
        corpora.BUILT_IN,
    )
    documents: int = common.flag("At most so many documents.", 500)
    queries: int = common.flag("Queries made of each document.", 2)
    lengths: list[int] = common.flag("Documents are cut at so many tokens.", [1024, 2048, 4096])
    readers: list[str] = common.flag(f"Some of {', '.join(READERS)}.", [*READERS])
    chunk_lengths: list[int] = common.flag("Tokens of a chunk; the source must read so many.", [512, 128])
    sparsity_types: list[str] = common.flag("LSG settings.", ["norm", *(n for n in SPARSITY_TYPES if n != "norm")])
    block_sizes: list[int] = common.flag("LSG settings; sparse blocks get the same size.", [128, 32])
    sparsity_factors: list[int] = common.flag("LSG settings.", [2])
    num_global_tokens: list[int] = common.flag("LSG settings.", [0, 1])
    position_init: list[str] = common.flag("How lsg-convert is to lengthen positions.", ["tile", "interpolate"])
    cross: bool = common.flag("Try all combinations of LSG settings.", False)
    setting_lengths: list[int] | None = common.flag("Where to try settings beyond the base; at all unless given.")
    pool_factor: int = common.flag("So many states of tokens become one.", 8)
    batch_size: int = common.flag("Chunks and queries that are read at once; whole documents are read one by one.", 1)
    device: str | None = common.flag("Where to compute: cpu, cuda; the fastest there is unless given.")
    figure: str | None = common.flag("Where to draw quality and cost, a .png; study.png in --output unless given.")


def settings(options: StudyArguments, source_length: int) -> list[dict[str, Any]]:
    """The LSG settings, the base first. Texts that the source can read get full attention in each of them."""
    axes: dict[str, list[Any]] = {
        "sparsity_type": options.sparsity_types,
        "block_size": options.block_sizes,
        "sparsity_factor": options.sparsity_factors,
        "num_global_tokens": options.num_global_tokens,
        POSITION_INIT: options.position_init,
    }
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not options.cross:
        rows = [row for row in rows if sum(row[name] != values[0] for name, values in axes.items()) <= 1]
    for row in rows:
        row |= {"sparse_block_size": row["block_size"], "full_attention_length": source_length}
    return rows


def readers(options: StudyArguments, length: int, source_length: int) -> list[tuple[bool, Reader]]:
    """What reads documents of that length, and whether it is one of the main ones."""
    found: list[tuple[bool, Reader]] = []
    base, *others = settings(options, source_length)
    if "bm25" in options.readers:
        found.append((True, Reader("BM25", "BM25", "bm25")))
    if "truncation" in options.readers:
        found.append((True, Reader(f"source, first {source_length} tokens", "source", "truncation")))
    if "chunks" in options.readers:
        for place, chunk in enumerate(options.chunk_lengths):
            name = f"source, chunks of {chunk}"
            found.append((True, Reader(name, "source", "chunks", chunk=chunk, tokens=not place)))
    if "full" in options.readers:
        whole = base | {"num_global_tokens": 0, "full_attention_length": length}
        found.append((True, Reader("full attention", "full attention", "full", whole, tokens=True)))
    if "lsg" in options.readers:
        found.append((True, Reader(label(base), "LSG", "lsg", base, tokens=True)))
        if options.setting_lengths is None or length in options.setting_lengths:
            found += [(False, Reader(label(row), "LSG", "lsg", row)) for row in others]
    return found


def label(row: dict[str, Any]) -> str:
    globals_ = row["num_global_tokens"]
    return (
        f"LSG {row['sparsity_type']}, block {row['block_size']}, factor {row['sparsity_factor']}, "
        f"{globals_} global{'s' * (globals_ != 1)}, {row[POSITION_INIT]}"
    )


def measured(study: Study, reader: Reader) -> list[Result]:
    """The results of a reader, from the folder where they are there."""
    name = "".join(letter if letter.isalnum() else "-" for letter in reader.name)
    path = Path(study.options.output) / str(study.length) / f"{name}.json"
    options = {name: getattr(study.options, name) for name in ("model", "chunk_lengths", "pool_factor", "batch_size")}
    mark = [asdict(study.corpus), asdict(reader), options, study.length]
    return [Result(**row) for row in common.kept(path, mark, lambda: [asdict(row) for row in study.run(reader)])]


def check(options: StudyArguments) -> None:
    if wrong := [name for name in options.readers if name not in READERS]:
        raise common.OptionError(f"--readers: got {wrong[0]!r}; give some of {', '.join(READERS)}")
    for name in ("documents", "queries", "pool_factor", "batch_size", "lengths", "chunk_lengths"):
        value = getattr(options, name)
        if (min(value, default=0) if isinstance(value, list) else value) < 1:
            raise common.OptionError(f"--{name}: got {value}; give 1 or more")


@common.command
def main(arguments: Sequence[str]) -> None:
    (options,) = common.parse_flags([StudyArguments], arguments)
    check(options)
    check_figure(options.figure)
    transformers.utils.logging.disable_progress_bar()
    studies = []
    for length in sorted(options.lengths):
        folder = systems.converted(options, options.position_init[0], length)
        limit = systems.source_length(folder)
        if length <= limit or max(options.chunk_lengths) > limit:
            raise common.OptionError(
                f"--lengths, --chunk_lengths: got {length} and {max(options.chunk_lengths)}; "
                f"the source reads {limit} tokens: give lengths above, and chunks up to it"
            )
        model = systems.Model.load(str(folder), "cpu")
        room = length - model.extra("document")
        corpus = corpora.load(options.corpus, model.tokenizer, room, options.documents, options.queries)
        studies.append(Study(options, length, corpus, limit))
        print(f"{length} tokens: {len(corpus.documents)} documents, {len(corpus.queries)} queries", flush=True)
    # What matters most comes first, at every length, in case that the study is stopped.
    jobs = [(first, study, reader) for study in studies for first, reader in readers(options, study.length, limit)]
    results: list[tuple[bool, Result]] = []
    for first, study, reader in sorted(jobs, key=lambda job: not job[0]):
        results += [(first, row) for row in measured(study, reader)]
    device = options.device or systems.Model.load(options.model, None).device.type
    host = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}"
    text = tables.report(studies, results, options.chunk_lengths[0], f"{host}; {versions}")
    (Path(options.output) / "results.md").write_text(text)
    print(text, end="")
    tables.draw(Path(options.figure or Path(options.output) / "study.png"), studies, results)


if __name__ == "__main__":
    sys.exit(main())
