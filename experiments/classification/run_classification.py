"""Fine-tune an LSG checkpoint to classify long documents, beside what an expert would try first.

A row of a dataset has a text, or a list of its paragraphs, and one label (as LexGLUE's SCOTUS) or a list of labels (as
its ECtHR). Labels are names, numbers, or of a `ClassLabel`. The systems:

- lsg: the checkpoint, which reads the document;
- truncation: its source, which reads the first `--source_length` tokens;
- chunks: its source, which reads the document in chunks of so many tokens; their logits are averaged, in training too;
- tfidf: TF-IDF with a linear support vector machine.

The source is the checkpoint itself without global tokens, with full attention up to `--source_length`: on texts of that
length it computes what the source does.

    python experiments/classification/run_classification.py --model_name_or_path lsg-minilm --trust_remote_code \\
        --train_file train.jsonl --test_file test.jsonl --do_train --do_predict --output_dir classifier
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed


sys.path.append(str(Path(__file__).parents[1]))

import common
from common import DataArguments, ModelArguments, OptionError, SettingArguments

from lsg_converter.tune import even


SYSTEMS = ("lsg", "truncation", "chunks", "tfidf")


@dataclass
class ClassificationArguments(DataArguments):
    """The columns, and what is compared."""

    text_column_name: str = common.flag("The column of texts, or of lists of paragraphs.", "text")
    label_column_name: str = common.flag("The column of labels, or of lists of labels.", "label")
    systems: list[str] | None = field(
        default=None, metadata={"help": f"What to compare: all of {', '.join(SYSTEMS)} unless given."}
    )
    source_length: int = common.flag("Tokens that the checkpoint's source reads.", 512)

    def __post_init__(self) -> None:
        if unknown := {*(self.systems or ())} - {*SYSTEMS}:
            raise ValueError(f"--systems: got {', '.join(unknown)}; give some of {', '.join(SYSTEMS)}")
        if self.source_length < 3:
            raise ValueError(f"--source_length: got {self.source_length}; give 3 or more, two tokens are special")


class Labels:
    """The names of the labels, and what a row's label is among them: a number, or a 0 or 1 for each."""

    def __init__(self, datasets: dict[str, Any], column: str, known: list[str] | None) -> None:
        """`known` are the names, in their order, where a model has learned them already."""
        values = [value for dataset in datasets.values() for value in dataset[column]]
        feature = next(iter(datasets.values())).features[column]
        self.of_feature = getattr(getattr(feature, "feature", feature), "names", None)
        self.multiple = isinstance(values[0], list)
        found = {item for value in values for item in value} if self.multiple else {*values}
        if None in found:
            raise OptionError(f"--label_column_name: {column!r} has rows without a label; leave them out")
        self.names = known or self.of_feature or [str(item) for item in sorted(found)]
        if unknown := {self.name(item) for item in found} - {*self.names}:
            raise OptionError(f"--label_column_name: got {', '.join(unknown)}; the model knows {', '.join(self.names)}")

    def name(self, item: Any) -> str:
        return self.of_feature[item] if self.of_feature else str(item)

    def encode(self, value: Any) -> Any:
        if not self.multiple:
            return self.names.index(self.name(value))
        own = {self.name(item) for item in value}
        return [float(name in own) for name in self.names]

    def compute_metrics(self, output: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(output.predictions)
        return self.scores(logits > 0 if self.multiple else logits.argmax(axis=-1), np.asarray(output.label_ids))

    @staticmethod
    def scores(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        """With the ends of the bootstrap interval of accuracy; a document's labels are right where all of them are."""
        metrics = common.need("sklearn.metrics")
        right = (predicted == wanted).reshape(len(wanted), -1).all(axis=1)
        low, high = common.interval(right, common.draws(range(len(right))))
        f1 = {kind: metrics.f1_score(wanted, predicted, average=kind, zero_division=0) for kind in ("micro", "macro")}
        accuracy = {"accuracy": right.mean(), "accuracy_low": low, "accuracy_high": high}
        return {"micro_f1": f1["micro"], "macro_f1": f1["macro"], **accuracy}


class ChunkCollator:
    """A batch of the chunks of several documents; `document` says of which each is."""

    def __init__(self, pad: DataCollatorWithPadding) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["labels"] for row in rows])
        document = torch.tensor([number for number, row in enumerate(rows) for _ in row["input_ids"]])
        chunks = self.pad([{"input_ids": chunk} for row in rows for chunk in row["input_ids"]])
        return {"labels": labels, "document": document, **chunks}  # The first one's length is the batch's.


class ChunkTrainer(Trainer):
    """The logits of a document are the mean of its chunks'."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        labels, document = inputs.pop("labels"), inputs.pop("document")
        logits = model(**inputs).logits
        sums = logits.new_zeros(len(labels), logits.shape[-1]).index_add(0, document, logits)
        logits = sums / document.bincount(minlength=len(labels))[:, None]
        loss = (binary_cross_entropy_with_logits if labels.ndim > 1 else cross_entropy)(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def chunks(ids: list[int], length: int) -> list[list[int]]:
    """The tokens of a text in even chunks of at most `length`, each between the two special tokens."""
    first, *words, last = ids
    return [[first, *part, last] for part in even(words, length - 2)]


def linear(data: ClassificationArguments, datasets: dict[str, Any], labels: Labels) -> Iterator[dict[str, Any]]:
    """Rows of TF-IDF, of words and pairs of words, with a linear support vector machine."""

    def read(split: str) -> tuple[list[str], np.ndarray]:
        texts = [common.joined(text) for text in datasets[split][data.text_column_name]]
        return texts, np.array([labels.encode(value) for value in datasets[split][data.label_column_name]])

    model = common.need("sklearn.svm").LinearSVC()
    if labels.multiple:
        model = common.need("sklearn.multiclass").OneVsRestClassifier(model)
    vectorizer = common.need("sklearn.feature_extraction.text").TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    texts, wanted = read("train")
    model.fit(vectorizer.fit_transform(texts), wanted)
    for split in common.held_out(datasets):
        texts, wanted = read(split)
        yield {"system": "tfidf", "split": split, **labels.scores(model.predict(vectorizer.transform(texts)), wanted)}


def neural(
    system: str,
    model_arguments: ModelArguments,
    data: ClassificationArguments,
    training: TrainingArguments,
    setting_arguments: SettingArguments,
    datasets: dict[str, Any],
    labels: Labels,
) -> Iterator[dict[str, Any]]:
    """Rows of lsg, truncation or chunks."""
    more: dict[str, Any] = {
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "id2label": dict(enumerate(labels.names)),
        "problem_type": f"{'multi' if labels.multiple else 'single'}_label_classification",
    }
    training = copy.copy(training)
    training.remove_unused_columns = False
    if system != "lsg":
        training.output_dir = str(Path(str(training.output_dir)) / system)
        more |= {"num_global_tokens": 0, "full_attention_length": data.source_length}
    set_seed(training.seed)  # The same head to begin with, and the same order of documents.
    config = common.read_config(model_arguments, **more)
    settings = setting_arguments.settings(config) if system == "lsg" else [{}]
    tokenizer = common.load_tokenizer(model_arguments)
    limit = data.source_length if system == "truncation" else tokenizer.model_max_length

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(common.joined(row[data.text_column_name]), truncation=True, max_length=limit)["input_ids"]
        tokens = chunks(ids, data.source_length) if system == "chunks" else ids
        return {"input_ids": tokens, "labels": labels.encode(row[data.label_column_name])}

    encoded = common.encode(datasets, encode)
    pad = DataCollatorWithPadding(tokenizer)
    trainer_class, collator = (ChunkTrainer, ChunkCollator(pad)) if system == "chunks" else (Trainer, pad)
    trainer = trainer_class(
        model=common.load_model(AutoModelForSequenceClassification, model_arguments, config, "SEQ_CLS"),
        args=training,
        data_collator=collator,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        compute_metrics=labels.compute_metrics,
    )
    if training.do_train:
        common.train(trainer)
    for row in common.evaluate(trainer, encoded, settings):
        yield {"system": system, **row}


@common.command
def main(flags: Sequence[str]) -> None:
    kinds = (ModelArguments, ClassificationArguments, TrainingArguments, SettingArguments)
    model_arguments, data, training, setting_arguments = common.parse(kinds, flags)
    config = common.read_config(model_arguments)
    if not training.do_train and {*(data.systems or ["lsg"])} != {"lsg"}:
        raise OptionError("--systems: without --do_train there is only lsg, a classifier that was trained before")
    systems = data.systems or (SYSTEMS if training.do_train else ["lsg"])
    if len({*systems} - {"tfidf"}) > 1 and str(training.resume_from_checkpoint or "true").lower() != "true":
        raise OptionError("--resume_from_checkpoint: a checkpoint is of one system; give true, or one of --systems")
    datasets = common.load_splits(data, training, data.text_column_name, data.label_column_name)
    labels = Labels(datasets, data.label_column_name, None if training.do_train else list(config.id2label.values()))
    rows: list[dict[str, Any]] = []
    for system in systems:
        if system == "tfidf":
            rows += linear(data, datasets, labels)
        else:
            rows += neural(system, model_arguments, data, training, setting_arguments, datasets, labels)
        common.write_results(training, flags, rows)  # What is measured is kept.
    common.print_table(training, rows)


if __name__ == "__main__":
    sys.exit(main())
