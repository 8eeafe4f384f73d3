"""The systems of `study.py`: how documents are read, what an index keeps of them, and what both cost.

A reader goes over all documents once. What it has read may be kept in several ways, each of which is a system: an LSG
model that has read a document gives one vector, or one for each of its spans, or the states of its tokens.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "efficiency")]

import common
from corpora import Corpus
from steps import growth, synchronize

from lsg_converter import ConversionOptions, convert
from lsg_converter.report import FILE_NAME
from lsg_converter.tune import even


METRICS = {"nDCG@10": ("ndcg@k", 10), "recall@1": ("recall@k", 1), "MRR@10": ("mrr@k", 10)}
POSITION_INIT = "position_init"  # beside the LSG fields in the settings of a reader; it changes weights


@dataclass(frozen=True)
class Reader:
    """How documents are read.

    Attributes:
        name: unique, also as the name of a file.
        title: what its systems are called by.
        kind: bm25, truncation, chunks, full or lsg.
        fields: of the LSG configuration, and `position_init`.
        chunk: tokens of a chunk, where the reader reads in chunks.
        tokens: whether the states of tokens are kept too.
    """

    name: str
    title: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    chunk: int = 0
    tokens: bool = False


@dataclass
class Result:
    """A system on one corpus; `metrics` has a value for each query, and costs are means over documents."""

    reader: str
    title: str
    system: str
    length: int
    metrics: dict[str, list[float]]
    seconds: float  # of the processor, on a CPU; of the clock, on a GPU
    peak_bytes: int
    vectors: float
    index_bytes: float


class Model:
    """A sentence model that gives the vector of a text, and the states of its tokens."""

    def __init__(self, model: Any) -> None:
        """`model` is a SentenceTransformer. Raises OptionError where it has no pooling."""
        pooling = common.need("sentence_transformers.sentence_transformer.modules").Pooling
        self.model = model
        kinds = [isinstance(module, pooling) for module in self.model]
        if kinds.count(True) != 1:
            raise common.OptionError("--model: it has no pooling; give a sentence model that has one vector")
        self.behind = list(self.model)[kinds.index(True) + 1 :]
        self.tokenizer = self.model.tokenizer
        self.device = self.model.device
        self.prompts = {
            "query": self.model.prompts.get("query") or "",
            "document": self.model.prompts.get("document") or self.model.prompts.get("passage") or "",
        }
        first, last = self.words("a"), self.tokenizer("a", verbose=False)["input_ids"]
        place = last.index(first[0])
        self.front, self.back = last[:place], last[place + len(first) :]

    @classmethod
    def load(cls, name: str, device: str | None, **fields: Any) -> "Model":
        """From a folder or the Hub; where this package wrote it, with its code and these LSG fields."""
        library = common.need("sentence_transformers")
        lsg = (Path(name) / FILE_NAME).is_file()
        try:
            return cls(
                library.SentenceTransformer(name, device=device, trust_remote_code=lsg, config_kwargs=fields or None)
            )
        except common.FAULTS as error:
            raise common.OptionError(f"--model: {name!r}: {common.first_line(error)}") from error

    def words(self, text: str) -> list[int]:
        """The token ids of a text, without special ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def extra(self, role: str) -> int:
        """How many tokens are put around a text."""
        return len(self.front) + len(self.words(self.prompts[role])) + len(self.back)

    @torch.inference_mode()
    def read(self, texts: Sequence[list[int]], role: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The normalised vector of each text of token ids, shape (width,), and the states of its own tokens, shape
        (tokens, width)."""
        front = self.front + self.words(self.prompts[role])
        for begin in range(0, len(texts), batch_size):
            batch = texts[begin : begin + batch_size]
            ids = [[*front, *text, *self.back] for text in batch]
            features = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            features = self.model({name: value.to(self.device) for name, value in features.items()})
            for text, vector, states in zip(
                batch, features["sentence_embedding"], features["token_embeddings"], strict=True
            ):
                yield normal(vector), states[len(front) : len(front) + len(text)]

    @torch.inference_mode()
    def means(self, states: Tensor, span: int) -> Tensor:
        """A normalised vector for each span of at most so many tokens, of the mean of its states: what the model makes
        of it behind its pooling."""
        features = {"sentence_embedding": torch.stack([part.mean(dim=0) for part in even(states, span)])}
        for module in self.behind:
            features = module(features)
        return normal(features["sentence_embedding"])


def normal(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


def first(tokens: list[int], room: int) -> list[list[int]]:
    return [tokens[:room]]


def clock(device: torch.device) -> float:
    """Seconds of this process alone, so that other work on the machine counts little; on a GPU, of the clock."""
    synchronize(device)
    return perf_counter() if device.type == "cuda" else process_time()


# What is read, and how it is kept


@dataclass
class Study:
    """What the readers share: the flags, and a corpus whose documents have at most `length` tokens, all counted."""

    options: Any
    length: int
    corpus: Corpus
    source_length: int

    def model(self, reader: Reader) -> Model:
        if reader.kind in ("truncation", "chunks"):
            return Model.load(self.options.model, self.options.device)
        fields = dict(reader.fields)
        folder = converted(self.options, fields.pop(POSITION_INIT), self.length)
        return Model.load(str(folder), self.options.device, **fields)

    def run(self, reader: Reader) -> list[Result]:
        """All systems of a reader."""
        return list(self.words(reader) if reader.kind == "bm25" else self.vectors(reader))

    def words(self, reader: Reader) -> Iterator[Result]:
        """BM25, with the defaults of bm25s, no stop words and no stemming."""
        bm25s = common.need("bm25s")

        def tokens(texts: list[str]) -> list[list[str]]:
            found: list[list[str]] = bm25s.tokenize(texts, stopwords=[], return_ids=False, show_progress=False)
            return found

        def index() -> Any:
            result = bm25s.BM25()
            result.index(tokens(self.corpus.documents), show_progress=False)
            return result

        start = process_time()
        found = index()
        seconds = process_time() - start
        none = np.zeros(len(self.corpus.documents), np.float32)  # of a query without words
        scores = torch.tensor(
            np.stack([found.get_scores(query) if query else none for query in tokens(self.corpus.queries)])
        )
        size = sum(found.scores[name].nbytes for name in ("data", "indices", "indptr"))
        size += sum(len(word.encode()) for word in found.vocab_dict)
        yield self.result(reader, "no vectors", scores, seconds, growth(index, "cpu"), 0, size)

    def vectors(self, reader: Reader) -> Iterator[Result]:
        model = self.model(reader)
        documents = [model.words(text) for text in self.corpus.documents]
        documents = [ids[: self.length - model.extra("document")] for ids in documents]
        chunk = self.source_length if reader.kind == "truncation" else reader.chunk
        parts = [[ids] for ids in documents]
        if chunk:
            room = chunk - model.extra("document")
            cut = first if reader.kind == "truncation" else even
            parts = [cut(ids, room) for ids in documents]
        largest = max(parts, key=lambda chunks: sum(map(len, chunks)))

        def read(document: list[list[int]]) -> tuple[Tensor, Tensor]:
            found = list(model.read(document, "document", self.options.batch_size))
            return torch.stack([vector for vector, _ in found]), torch.cat([states for _, states in found])

        read(largest[:1])  # loads what is loaded late
        peak = growth(lambda: read(largest), model.device.type)
        keep = self.kept(reader, model)
        index: dict[str, list[Tensor]] = {system: [] for system in keep}
        seconds = dict.fromkeys(keep, 0.0)
        for document in progress(parts, f"{self.length} {reader.name}"):
            start = clock(model.device)
            vectors, states = read(document)
            reading = clock(model.device) - start
            for system, make in keep.items():
                start = clock(model.device)
                index[system].append(make(vectors, states))
                seconds[system] += reading + clock(model.device) - start
        room = self.source_length - model.extra("query")
        asked_ids = [model.words(text)[:room] for text in self.corpus.queries]
        queries = list(model.read(asked_ids, "query", self.options.batch_size))
        vectors_of_queries = [vector[None] for vector, _ in queries]
        states_of_queries = [normal(states) for _, states in queries]
        maxsim = common.need("sentence_transformers.util").maxsim
        for system, kept in index.items():
            asked = states_of_queries if system.startswith("tokens") else vectors_of_queries
            count = sum(map(len, kept))
            scores = maxsim(asked, kept)
            size = count * kept[0].shape[1] * 4  # float32
            yield self.result(reader, system, scores, seconds[system], peak, count, size)

    def kept(self, reader: Reader, model: Model) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The systems of a reader: what each makes of the vectors of a document's parts and of its tokens' states."""
        systems: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

        def late(span: int) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda vectors, states: model.means(states, span)

        if reader.kind == "chunks":
            systems[f"mean of chunks of {reader.chunk}"] = lambda vectors, states: normal(vectors.mean(0, keepdim=True))
            systems[f"best chunk of {reader.chunk}"] = lambda vectors, states: vectors
        elif reader.kind == "truncation":
            systems[f"first {self.source_length} tokens"] = lambda vectors, states: vectors
        else:
            systems["one vector"] = lambda vectors, states: vectors
            for length in self.options.chunk_lengths:
                systems[f"late chunks of {length}"] = late(length - model.extra("document"))
        if reader.tokens:
            factor = self.options.pool_factor
            systems[f"tokens pooled by {factor}"] = lambda vectors, states: pooled(states, factor)
        return systems

    def result(
        self, reader: Reader, system: str, scores: Tensor, seconds: float, peak: int, vectors: int, size: int
    ) -> Result:
        count = len(self.corpus.documents)
        metrics = measure(scores, self.corpus.relevant)
        costs = (seconds / count, peak, vectors / count, size / count)
        return Result(reader.name, reader.title, system, self.length, metrics, *costs)


def pooled(states: Tensor, factor: int) -> Tensor:
    """The normalised states of tokens, of which similar ones are merged, to one for so many."""
    modules = common.need("sentence_transformers.multi_vector_encoder.modules")
    merged: Tensor = modules.HierarchicalTokenPooling(pool_factor=factor).pool([normal(states)])[0]
    return normal(merged)


def progress(items: list[Any], name: str) -> Any:
    return common.need("tqdm").tqdm(items, desc=name, mininterval=5, file=sys.stderr)


def converted(options: Any, position_init: str, length: int) -> Path:
    """The folder of the model, converted to so many tokens unless it is there."""
    folder = Path(options.output) / "models" / f"{position_init}-{length}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(
            ConversionOptions(
                initial_model=options.model,
                model_name=str(folder),
                max_sequence_length=length,
                position_init=position_init,  # type: ignore[arg-type]
            )
        )
    return folder


def source_length(folder: Path) -> int:
    """The tokens that the source of a converted model reads."""
    return int(json.loads((folder / FILE_NAME).read_text())["source_positions"])


def measure(scores: Tensor, relevant: list[list[int]]) -> dict[str, list[float]]:
    """What sentence-transformers' evaluator says of each query alone; `scores` has shape (queries, documents)."""
    evaluation = common.need("sentence_transformers.sentence_transformer.evaluation")
    names = [f"{place:0{len(str(scores.shape[1]))}}" for place in range(scores.shape[1])]
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for row, places in zip(scores, relevant, strict=True):
        evaluator = evaluation.InformationRetrievalEvaluator(
            queries={"query": ""},
            corpus=dict.fromkeys(names, ""),
            relevant_docs={"query": {names[place] for place in places}},
            score_functions={"given": lambda query, documents: query},
            corpus_chunk_size=len(names),
            write_csv=False,
        )
        given = SimpleNamespace(encode_query=lambda *_, _row=row, **__: _row[None])
        values = evaluator.compute_all_metrics(given, corpus_embeddings=scores.T)["given"]
        for name, (key, k) in METRICS.items():
            found[name].append(float(values[key][k]))
    assert all(math.isfinite(value) for values in found.values() for value in values)
    return found
