"""Write long documents of real text, for the fine-tuning scripts: what Python's and torch's own files say.

They are read from the source without running it, so any machine with torch can do this, offline. Of each task there are
train.jsonl, validation.jsonl and test.jsonl, and no documentation string stands in two of them:

- classification: the documentation strings and comments of a file of torch; `label` is the package of torch that the
  file is in, one of the largest.
- question_answering: as SQuAD; the context is the first sentences of many strings, each behind its name, and the
  question names one of them. The answer is its sentence, anywhere in the context.
- summarization: `text` is what a module's classes and functions say of themselves, `summary` what the module says.
- retrieval: `query` is the first sentence of a string, `document` the text of its module without this sentence.

    python experiments/make_data.py data [--words 800]
"""

import argparse
import ast
import io
import json
import random
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


LABELS = 4
QUERIES = 3  # of a document
SPLITS = {"train": 0.6, "validation": 0.1, "test": 0.3}
LEFT_OUT = {"test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__"}


class Entry(NamedTuple):
    """A documentation string; `name` is that of what it documents, "" for a module."""

    package: str
    module: str
    name: str
    text: str

    @property
    def sentence(self) -> str:
        return " ".join(self.text.split("\n\n")[0].split())


def entries(folder: Path) -> Iterator[Entry]:
    """All documentation strings of at least five words, in the order of their modules' names."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if LEFT_OUT & {*parts} or "tests" in parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        stack: list[tuple[str, ast.AST]] = [("", tree)]
        while stack:
            name, node = stack.pop()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 5:
                    yield Entry(parts[0], module, name, text)
            if isinstance(node, ast.Module | ast.ClassDef):
                inner = [item for item in node.body if hasattr(item, "name")]
                stack += [(f"{name}.{item.name}".lstrip("."), item) for item in reversed(inner)]


def prose(source: str) -> list[str]:
    """The documentation strings and comments of a file of Python, in their order; those of five words or more."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            found += [(node.body[0].lineno, text)] if text else []
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):  # and not behind code
            if token.start[0] != last + 1:
                found += [(last, "\n".join(block))]
                block = []
            block.append(token.string.lstrip("#!: ").rstrip())
            last = token.start[0]
    found += [(last, "\n".join(block))]
    return [text for _, text in sorted(found) if len(text.split()) >= 5]


def package(name: str) -> list[Path]:
    """The folders of a package; none where it is not installed."""
    spec = find_spec(name)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def files(folders: Iterable[Path], seen: set[str]) -> Iterator[tuple[Path, str]]:
    """The place in its folder of each file of Python, and its prose, without the paragraphs that were seen before."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(folder)
            if LEFT_OUT & {*place.parts} or "tests" in place.parts:
                continue
            try:
                parts = prose(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
                continue
            new = [part for part in dict.fromkeys(parts) if part not in seen]
            seen.update(new)
            yield place, "\n\n".join(new)


def filled(pool: list[Entry], words: int, draw: random.Random) -> list[Entry]:
    """Entries at random, until they have so many words."""
    chosen: list[Entry] = []
    while sum(len(entry.text.split()) for entry in chosen) < words:
        chosen.append(draw.choice(pool))
    return chosen


def classification(words: int) -> list[dict[str, str]]:
    rows = [
        {"text": text, "label": place.parts[0]}
        for place, text in files(package("torch"), set())
        if len(place.parts) > 1 and len(text.split()) >= words // 2
    ]
    largest = [name for name, _ in Counter(row["label"] for row in rows).most_common(LABELS)]
    return [row for row in rows if row["label"] in largest]


def question_answering(pool: list[Entry], words: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(item for item in pool if item.name):
        around = filled(pool, words, draw)
        around.insert(draw.randrange(len(around) + 1), entry)
        parts = [f"{item.module} {item.name}: {item.sentence}" for item in around]
        start = sum(len(part) + 1 for part in parts[: around.index(entry)]) + len(f"{entry.module} {entry.name}: ")
        answer = {"text": [entry.sentence], "answer_start": [start]}
        question = f"What is {entry.name} of {entry.module}?"
        yield {"id": str(number), "question": question, "context": "\n".join(parts), "answers": answer}


def of_modules(pool: list[Entry]) -> list[list[Entry]]:
    modules: dict[str, list[Entry]] = {}
    for entry in pool:
        modules.setdefault(entry.module, []).append(entry)
    return list(modules.values())


def summarization(pool: list[Entry]) -> Iterator[dict[str, str]]:
    for module in of_modules(pool):
        parts = [f"{entry.name}: {entry.text}" for entry in module if entry.name]
        if not module[0].name and len(parts) >= 3:
            yield {"text": "\n\n".join(parts), "summary": module[0].text}


def retrieval(pool: list[Entry], words: int, draw: random.Random) -> Iterator[dict[str, str]]:
    for module in of_modules(pool):
        with_more = [entry for entry in module if len(entry.sentence.split()) >= 6]
        asked = draw.sample(with_more, min(QUERIES, len(with_more)))
        first = {entry: entry.text.split("\n\n")[0] for entry in asked}
        texts = [entry.text.removeprefix(first.get(entry, "")).strip() for entry in module]
        document = "\n\n".join(text for text in texts if text)
        if len(document.split()) >= words // 4:
            yield from ({"query": entry.sentence, "document": document} for entry in asked)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write long documents of real text, for the fine-tuning scripts.")
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--words", type=int, default=800, help="about how many words a document has")
    options = parser.parse_args()
    found = list(entries(Path(sysconfig.get_paths()["stdlib"])))
    seen: dict[str, Entry] = {entry.text: entry for entry in found}
    found = list(seen.values())
    draw = random.Random(0)
    modules = sorted({entry.module for entry in found})
    draw.shuffle(modules)
    places = {module: number / len(modules) for number, module in enumerate(modules)}
    of_torch = classification(options.words)
    draw.shuffle(of_torch)
    begin = 0.0
    for split, share in SPLITS.items():
        own = [entry for entry in found if begin <= places[entry.module] < begin + share]
        edges = [round(edge * len(of_torch)) for edge in (begin, begin + share)]
        begin += share
        tasks: dict[str, Iterable[dict[str, Any]]] = {
            "classification": of_torch[slice(*edges)],
            "question_answering": question_answering(own, options.words, draw),
            "summarization": summarization(own),
            "retrieval": retrieval(own, options.words, draw),
        }
        for task, rows in tasks.items():
            path = options.folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) for row in rows]
            path.write_text("\n".join(lines) + "\n")
            print(f"{path}: {len(lines)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
