"""Fine-tune an LSG encoder-decoder to summarize long documents, and measure ROUGE.

The defaults are the recipe of the published LSG-BART checkpoints: learning rate 8e-5 with a warm-up over a tenth of the
steps, batches of 32 through accumulation, summaries of at most 512 tokens, five beams.

    python experiments/summarization/run_summarization.py --model_name_or_path lsg-bart-base --trust_remote_code \\
        --dataset_name ccdv/pubmed-summarization --text_column_name article --summary_column_name abstract \\
        --do_train --do_predict --output_dir summarizer
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


sys.path.append(str(Path(__file__).parents[1]))

import common
from common import DataArguments, ModelArguments, OptionError, SettingArguments


@dataclass
class SummaryArguments(DataArguments):
    """The columns, and how long a summary is."""

    text_column_name: str = common.flag("The column of texts, or of lists of paragraphs.", "text")
    summary_column_name: str = common.flag("The column of summaries.", "summary")
    max_target_length: int = common.flag(
        "The most tokens of a summary, in training and of those that are written.", 512
    )
    min_target_length: int = common.flag("The fewest tokens of those that are written.", 0)
    length_penalty: float = common.flag("Above 0, beams prefer longer summaries.", 2.0)


@dataclass
class RecipeArguments(Seq2SeqTrainingArguments):
    """Transformers' arguments, with the published recipe for defaults."""

    learning_rate: float = field(default=8e-5, metadata={"help": "The initial learning rate for AdamW."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, their share of all."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "The batch size of a device."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches that make an update."})
    generation_num_beams: int | None = field(default=5, metadata={"help": "Beams in evaluation."})


@common.command
def main(flags: Sequence[str]) -> None:
    kinds = (ModelArguments, SummaryArguments, RecipeArguments, SettingArguments)
    model_arguments, data, training, setting_arguments = common.parse(kinds, flags)
    scorer = common.need("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    config = common.read_config(model_arguments)
    if not config.is_encoder_decoder:
        name, kind = model_arguments.model_name_or_path, config.model_type
        raise OptionError(f"--model_name_or_path: {name!r} is of the family {kind!r}; give an encoder-decoder, as BART")
    settings = setting_arguments.settings(config)
    datasets = common.load_splits(data, training, data.text_column_name, data.summary_column_name)
    tokenizer = common.load_tokenizer(model_arguments)
    training.predict_with_generate = True

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        inputs = tokenizer(common.joined(row[data.text_column_name]), truncation=True)
        summary = common.joined(row[data.summary_column_name])
        labels = tokenizer(text_target=summary, truncation=True, max_length=data.max_target_length)
        return {"input_ids": inputs["input_ids"], "labels": labels["input_ids"]}

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        """ROUGE F1 in percent, and how many tokens the summaries have."""
        ids = [np.where(part == -100, tokenizer.pad_token_id, part) for part in (output.predictions, output.label_ids)]
        written, wanted = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in ids)
        scores = [scorer.score(target, summary) for target, summary in zip(wanted, written, strict=True)]
        result = {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in scores[0]}
        return {**result, "tokens": float(np.mean((ids[0] != tokenizer.pad_token_id).sum(axis=-1)))}

    encoded = common.encode(datasets, encode)
    model = common.load_model(AutoModelForSeq2SeqLM, model_arguments, config, "SEQ_2_SEQ_LM")
    model.generation_config.update(
        min_length=data.min_target_length,
        max_length=data.max_target_length,
        length_penalty=data.length_penalty,
        num_beams=training.generation_num_beams,
        early_stopping=True,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=training,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    if training.do_train:
        common.train(trainer)
    rows = []
    for row in common.evaluate(trainer, encoded, settings):
        rows.append(row)
        common.write_results(training, flags, rows)  # What is measured is kept.
    common.report(training, flags, rows)


if __name__ == "__main__":
    sys.exit(main())
