"""Go on training an LSG checkpoint as a masked language model, on long documents without labels.

Documents are put end to end and cut into texts of `--max_seq_length` tokens, as in Transformers' own example; with
`--line_by_line` each is a text of its own, cut at that length. The loss is measured before and after, under the same
masks.

    python experiments/mlm/run_mlm.py --model_name_or_path lsg-bert --trust_remote_code --max_seq_length 1024 \\
        --train_file train.jsonl --validation_file validation.jsonl --do_train --do_eval --output_dir adapted
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed


sys.path.append(str(Path(__file__).parents[1]))

import common
from common import DataArguments, ModelArguments


@dataclass
class MaskedArguments(DataArguments):
    """The column, and what is masked."""

    text_column_name: str = common.flag("The column of texts, or of lists of paragraphs.", "text")
    line_by_line: bool = common.flag("Each document is a text of its own.", False)
    mlm_probability: float = common.flag("The share of tokens that are to be guessed.", 0.15)


@common.command
def main(flags: Sequence[str]) -> None:
    model_arguments, data, training = common.parse((ModelArguments, MaskedArguments, TrainingArguments), flags)
    config = common.read_config(model_arguments)
    datasets = common.load_splits(data, training, data.text_column_name)
    tokenizer = common.load_tokenizer(model_arguments)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [common.joined(text) for text in rows[data.text_column_name]]
        if data.line_by_line:
            return {"input_ids": tokenizer(texts, truncation=True)["input_ids"]}
        tokens = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
        length = tokenizer.model_max_length
        whole = max(len(tokens) - len(tokens) % length, min(len(tokens), length))  # What is left over is left out.
        return {"input_ids": [tokens[start : start + length] for start in range(0, whole, length)]}

    encoded = common.encode(datasets, encode, batched=True)
    trainer = Trainer(
        model=common.load_model(AutoModelForMaskedLM, model_arguments, config),
        args=training,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
    )

    def measure(when: str) -> Iterator[dict[str, Any]]:
        set_seed(training.seed)
        for row in common.evaluate(trainer, encoded):
            yield {"model": when, **row, "perplexity": math.exp(row["loss"])}

    rows = list(measure("before" if training.do_train else "as it is"))
    if training.do_train:
        common.train(trainer)
        rows += measure("after")
    common.report(training, flags, rows)


if __name__ == "__main__":
    sys.exit(main())
