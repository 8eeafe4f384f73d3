"""Write long documents of real text, for the fine-tuning scripts: Python's own documentation strings.

They are read from the standard library's source without running it, so any machine with Python can do this, offline. Of
each task there are train.jsonl, validation.jsonl and test.jsonl, and no documentation string stands in two of them:

- classification: the strings of up to three packages in one document. `labels` are these packages (multi-label), and
  `label` is the one with most words. A reader of the document's beginning alone misses some of them.
- question_answering: as SQuAD; the context is the first sentences of many strings, each behind its name, and the
  question names one of them. The answer is its sentence, anywhere in the context.
- summarization: `text` is what a module's classes and functions say of themselves, `summary` what the module says.
- retrieval: `query` is the first sentence of a string, `document` the text of its module without this sentence.

    python experiments/make_data.py data [--words 800]
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


LABELS = 8
QUERIES = 3  # of a document
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
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


def filled(pool: list[Entry], words: int, draw: random.Random) -> list[Entry]:
    """Entries at random, until they have so many words."""
    chosen: list[Entry] = []
    while sum(len(entry.text.split()) for entry in chosen) < words:
        chosen.append(draw.choice(pool))
    return chosen


def classification(pool: list[Entry], words: int, draw: random.Random, labels: list[str]) -> Iterator[dict[str, Any]]:
    by_label = {label: [entry for entry in pool if entry.package == label] for label in labels}
    for _ in range(sum(map(len, by_label.values())) // 5):
        packages = draw.sample(labels, draw.randint(1, 3))
        shares = sorted(draw.random() for _ in packages[1:])
        shares = [end - begin for begin, end in zip([0, *shares], [*shares, 1], strict=True)]
        runs = [
            filled(by_label[name], int(share * words) + 40, draw) for name, share in zip(packages, shares, strict=True)
        ]
        lengths = Counter({run[0].package: sum(len(entry.text) for entry in run) for run in runs})
        text = "\n\n".join(entry.text for run in runs for entry in run)
        yield {"text": text, "labels": sorted(packages), "label": lengths.most_common(1)[0][0]}


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
    # Whole modules go to a split, but for classification, whose packages must be in all of them.
    seen: dict[str, Entry] = {entry.text: entry for entry in found}
    found = list(seen.values())
    draw = random.Random(0)
    modules = sorted({entry.module for entry in found})
    draw.shuffle(modules)
    places = {module: number / len(modules) for number, module in enumerate(modules)}
    labels = [name for name, _ in Counter(entry.package for entry in found).most_common(LABELS)]
    begin = 0.0
    for split, share in SPLITS.items():
        own = [entry for entry in found if begin <= places[entry.module] < begin + share]
        part = [entry for entry in found if begin <= random.Random(entry.text).random() < begin + share]
        begin += share
        tasks: dict[str, Iterator[dict[str, Any]]] = {
            "classification": classification(part, options.words, draw, labels),
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
