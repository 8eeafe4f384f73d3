"""Fine-tune an LSG checkpoint to find answers in long contexts, which it reads whole: no stride, no windows to merge.

The data is as SQuAD's: `question`, `context`, and `answers` with lists `text` and `answer_start`, which are empty where
there is no answer. An answer beyond `--max_seq_length` tokens counts as none in training, and as missed in evaluation.

    python experiments/question_answering/run_qa.py --model_name_or_path lsg-bert --trust_remote_code \\
        --train_file train.jsonl --validation_file validation.jsonl --do_train --do_eval --output_dir reader
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)


sys.path.append(str(Path(__file__).parents[1]))

import common
from common import DataArguments, ModelArguments


@dataclass
class QuestionArguments(DataArguments):
    """The columns, and what an answer may be."""

    question_column_name: str = common.flag("The column of questions.", "question")
    context_column_name: str = common.flag("The column of contexts.", "context")
    answer_column_name: str = common.flag("The column of answers.", "answers")
    max_answer_length: int = common.flag("The most tokens that an answer may have.", 30)
    version_2_with_negative: bool = common.flag("Some questions have no answer: it may be empty.", False)


def normalized(text: str) -> list[str]:
    """The words that SQuAD compares: no case, no punctuation, no articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1(answer: str, wanted: str) -> float:
    """The F1 of the words of two answers."""
    own, gold = normalized(answer), normalized(wanted)
    if not own or not gold:
        return float(own == gold)
    shared = sum((Counter(own) & Counter(gold)).values())
    return 2 * shared / (len(own) + len(gold))


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray, longest: int) -> tuple[int, int, float]:
    """The span of allowed tokens with the highest sum of logits, and this sum."""
    start, end = (np.where(allowed, logits, -np.inf) for logits in (start, end))
    # Row k holds the sums of spans of k + 1 tokens; a span ends no later than the text.
    spans = [start[: len(start) - k] + end[k:] for k in range(min(longest, len(start)))]
    sums = [(float(row.max()), k, int(row.argmax())) for k, row in enumerate(spans)]
    score, k, first = max(sums, key=lambda item: item[0])
    return first, first + k, score


class Reader:
    """What becomes of rows and of logits."""

    def __init__(self, tokenizer: Any, data: QuestionArguments) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.rows: Any = None  # The dataset that is being evaluated.

    def tokens(self, row: dict[str, Any]) -> Any:
        question, context = row[self.data.question_column_name].strip(), row[self.data.context_column_name]
        return self.tokenizer(question, context, truncation="only_second", return_offsets_mapping=True)

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        tokens, answers = self.tokens(row), row[self.data.answer_column_name]
        first = last = 0  # No answer, or it stands beyond what is read: the first token.
        if answers["text"]:
            begin = answers["answer_start"][0]
            end = begin + len(answers["text"][0])
            places = zip(tokens.sequence_ids(), tokens["offset_mapping"], strict=True)
            inside = [n for n, (part, (left, right)) in enumerate(places) if part == 1 and left < end and right > begin]
            if inside and tokens["offset_mapping"][inside[-1]][1] >= end:
                first, last = inside[0], inside[-1]
        inputs = {name: tokens[name] for name in self.tokenizer.model_input_names if name in tokens}
        return {**inputs, "start_positions": first, "end_positions": last}

    def compute_metrics(self, output: EvalPrediction) -> dict[str, float]:
        """Exact matches and F1, in percent, as SQuAD has them."""
        exact, overlap = [], []
        for row, start, end in zip(self.rows, *output.predictions[:2], strict=True):
            answer = self.answer(row, start, end)
            wanted = row[self.data.answer_column_name]["text"] or [""]
            exact.append(max(float(normalized(answer) == normalized(text)) for text in wanted))
            overlap.append(max(f1(answer, text) for text in wanted))
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}

    def answer(self, row: dict[str, Any], start: np.ndarray, end: np.ndarray) -> str:
        tokens = self.tokens(row)
        length = len(tokens["input_ids"])
        allowed = np.array([part == 1 for part in tokens.sequence_ids()])
        first, last, score = best_span(start[:length], end[:length], allowed, self.data.max_answer_length)
        if not allowed.any() or (self.data.version_2_with_negative and start[0] + end[0] > score):
            return ""
        offsets = tokens["offset_mapping"]
        return row[self.data.context_column_name][offsets[first][0] : offsets[last][1]]


@common.command
def main(flags: Sequence[str]) -> None:
    model_arguments, data, training = common.parse((ModelArguments, QuestionArguments, TrainingArguments), flags)
    config = common.read_config(model_arguments)
    columns = (data.question_column_name, data.context_column_name, data.answer_column_name)
    datasets = common.load_splits(data, training, *columns)
    tokenizer = common.load_tokenizer(model_arguments)
    reader = Reader(tokenizer, data)
    encoded = common.encode(datasets, reader.encode)
    trainer = Trainer(
        model=common.load_model(AutoModelForQuestionAnswering, model_arguments, config, "QUESTION_ANS"),
        args=training,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        compute_metrics=reader.compute_metrics,
    )
    reader.rows = datasets.get("validation")  # for evaluations while it trains
    if training.do_train:
        common.train(trainer)
    rows: list[dict[str, Any]] = []
    for split in common.held_out(datasets):
        reader.rows = datasets[split]
        rows += common.evaluate(trainer, {split: encoded[split]})
    common.report(training, flags, rows)


if __name__ == "__main__":
    sys.exit(main())
