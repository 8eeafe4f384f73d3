"""The corpora of `study.py`: documents, queries, and which documents answer which query.

A passage query is made as follows: 60 tokens from beyond token 600 of a document, of which a third of the words are
dropped. Only a reader of the whole document has seen it, and it is in no index word for word.
"""

import json
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).parents[1]))

import common
from make_data import files, package


BUILT_IN = "built-in"
LONGEMBED, LONGEMBED_NAME = "dwzhu/LongEmbed", "longembed/"
PASSAGE, BEYOND, DROPPED = 60, 600, 1 / 3  # tokens, tokens, a share of the words
MIN_WORDS, TRIES = 15, 20
PIECES = 4  # at most so many documents from one file, so that no long one is most of the corpus


@dataclass
class Corpus:
    """Texts, and for each query the places of the documents that answer it."""

    documents: list[str]
    queries: list[str]
    relevant: list[list[int]]


@cache
def built_in() -> tuple[list[str], Callable[[], list[str]]]:
    """What files say of themselves: those of Python's library, of numpy and of torch; and what reads those of
    Transformers and huggingface_hub, for a corpus that the former do not fill. No paragraph stands in two."""
    seen: set[str] = set()

    def read(*folders: Path) -> list[str]:
        return [text for _, text in files(folders, seen)]

    texts = read(Path(sysconfig.get_paths()["stdlib"]), *package("numpy"), *package("torch"))
    return texts, cache(lambda: read(*package("transformers"), *package("huggingface_hub")))


class Spans:
    """A text, and where its tokens stand in it."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.text, self.offsets = text, [(start, end) for start, end in encoded["offset_mapping"] if start < end]

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, begin: int, end: int) -> str:
        """The text from token `begin` up to token `end`."""
        return self.text[self.offsets[begin][0] : self.offsets[min(end, len(self)) - 1][1]] if len(self) else ""


def passage(spans: Spans, length: int, draw: random.Random, begin: int = BEYOND) -> str:
    """A query from tokens `begin` to `length` of a document; if need be from another place, so that it holds words."""
    for _ in range(TRIES):
        start = draw.randrange(min(begin, length - PASSAGE), length - PASSAGE + 1)
        words = spans.part(start, start + PASSAGE).split()
        if len(re.findall(r"[^\W\d_]{3,}", " ".join(words))) >= MIN_WORDS:
            break
    kept = sorted(draw.sample(range(len(words)), len(words) - int(len(words) * DROPPED)))
    return " ".join(words[place] for place in kept)


def with_passages(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    count: int,
    per_document: int,
    begin: int = BEYOND,
    further: Callable[[], Iterable[str]] = tuple,
) -> Corpus:
    """Documents of `length` tokens, each with passages of its own as queries.

    They come from texts drawn at random, several from a long one: a query's document has neighbours that are near it.
    Where these do not give `count`, they are followed by what `further` gives.
    """
    draw = random.Random(0)
    drawn = list(texts)
    draw.shuffle(drawn)

    def others() -> Iterator[str]:
        yield from random.Random(0).sample(more := list(further()), len(more))

    corpus = Corpus([], [], [])
    for text in chain(drawn, others()):
        if len(corpus.documents) == count:
            break
        whole = Spans(text, tokenizer)
        for n in range(min(len(whole) // length, PIECES, count - len(corpus.documents))):
            document = Spans(whole.part(n * length, (n + 1) * length), tokenizer)
            for _ in range(per_document if length >= begin + PASSAGE else 0):
                corpus.queries.append(passage(document, min(len(document), length), draw, begin))
                corpus.relevant.append([len(corpus.documents)])
            corpus.documents.append(document.text)
    return corpus


def with_queries(
    documents: dict[str, str], queries: dict[str, str], relevant: dict[str, list[str]], tokenizer: Any, length: int
) -> Corpus:
    """A corpus that has queries of its own; documents are cut at `length` tokens."""
    place = {name: number for number, name in enumerate(documents)}
    answers = {name: [place[item] for item in relevant.get(name, ()) if item in place] for name in queries}
    answers = {name: found for name, found in answers.items() if found}
    texts = [Spans(text, tokenizer).part(0, length) for text in documents.values()]
    return Corpus(texts, [queries[name] for name in answers], list(answers.values()))


def read_file(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise common.OptionError(f"--corpus: {str(path)!r}: {common.first_line(error)}") from error
    columns = [{key for key in row if isinstance(row[key], str)} if isinstance(row, dict) else set() for row in rows]
    kinds = {"text" if "text" in own else "pair" if {"query", "document"} <= own else "" for own in columns}
    if len(kinds) != 1 or "" in kinds:
        raise common.OptionError(
            f"--corpus: {str(path)!r}: got rows of other columns or types; "
            "give in each line a text, or a query and a document"
        )
    return rows


def longembed(task: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """A task of LongEmbed, from the Hub: documents, queries, and what answers them."""
    datasets = common.need("datasets")
    try:
        parts = datasets.load_dataset(LONGEMBED, task)
    except (*common.FAULTS, datasets.exceptions.DatasetsError) as error:
        raise common.OptionError(f"--corpus: {LONGEMBED_NAME}{task}: {common.first_line(error)}") from error
    relevant: dict[str, list[str]] = {}
    for row in parts["qrels"]:
        relevant.setdefault(row["qid"], []).append(row["doc_id"])
    documents = {row["doc_id"]: row["text"] for row in parts["corpus"]}
    return documents, {row["qid"]: row["text"] for row in parts["queries"]}, relevant


def load(name: str, tokenizer: Any, length: int, count: int, per_document: int) -> Corpus:
    """The corpus of that name, cut at `length` tokens. Raises OptionError where there is none, or it has no query."""
    if name.startswith(LONGEMBED_NAME):
        corpus = with_queries(*longembed(name.removeprefix(LONGEMBED_NAME)), tokenizer, length)
    elif name == BUILT_IN:
        texts, further = built_in()
        corpus = with_passages(texts, tokenizer, length, count, per_document, further=further)
    elif not Path(name).is_file():
        raise common.OptionError(
            f"--corpus: got {name!r}; give {BUILT_IN}, a .jsonl file, or {LONGEMBED_NAME} and a task, such as "
            f"{LONGEMBED_NAME}narrativeqa"
        )
    elif "text" in (rows := read_file(Path(name)))[0]:
        corpus = with_passages((row["text"] for row in rows), tokenizer, length, count, per_document)
    else:
        texts = list(dict.fromkeys(row["document"] for row in rows))[:count]
        queries = {str(number): row["query"] for number, row in enumerate(rows)}
        relevant = {str(number): [row["document"]] for number, row in enumerate(rows)}
        corpus = with_queries({text: text for text in texts}, queries, relevant, tokenizer, length)
    if not corpus.queries:
        raise common.OptionError(
            f"--corpus: {name!r} gives no query at {length} tokens; give other --lengths, above {BEYOND + PASSAGE}"
        )
    return corpus
