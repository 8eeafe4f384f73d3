"""Fine-tune an LSG sentence model on pairs of a query and the long document that answers it.

It learns to put a query nearer to its document than to the others of its batch (`MultipleNegativesRankingLoss`); with
`--mini_batch_size`, batches may be larger than memory allows. Retrieval among all documents of a split is measured
before and after by sentence-transformers' `InformationRetrievalEvaluator`.

    python experiments/retrieval_finetuning/run_retrieval.py --model_name_or_path lsg-minilm --trust_remote_code \\
        --train_file train.jsonl --test_file test.jsonl --do_train --do_predict --output_dir retriever
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).parents[1]))

import common
from common import DataArguments, ModelArguments


METRICS = {"ndcg@10": "nDCG@10", "recall@1": "recall@1", "recall@5": "recall@5", "mrr@10": "MRR@10"}


@dataclass
class RetrievalArguments(DataArguments):
    """The columns, and the loss."""

    query_column_name: str = common.flag("The column of queries.", "query")
    document_column_name: str = common.flag("The column of documents.", "document")
    mini_batch_size: int | None = common.flag("Pairs that are read at once, where a batch is more than memory holds.")


@common.command
def main(flags: Sequence[str]) -> None:
    common.need("datasets")  # without which there is no trainer
    library = common.need("sentence_transformers")
    evaluation = common.need("sentence_transformers.sentence_transformer.evaluation")
    losses = common.need("sentence_transformers.sentence_transformer.losses")
    kinds = (ModelArguments, RetrievalArguments, library.SentenceTransformerTrainingArguments)
    model_arguments, data, training = common.parse(kinds, flags)
    if data.mini_batch_size and training.gradient_checkpointing:
        raise common.OptionError(
            "--mini_batch_size: it saves memory as --gradient_checkpointing does; give one of them"
        )
    common.read_config(model_arguments)
    query, document = data.query_column_name, data.document_column_name
    datasets = common.load_splits(data, training, query, document)
    # No batch holds a text twice: a query's own document would be wrong for it there.
    training.batch_sampler = common.need("sentence_transformers.base.sampler").BatchSamplers.NO_DUPLICATES
    model = library.SentenceTransformer(
        model_arguments.model_name_or_path,
        trust_remote_code=True,
        config_kwargs=common.parse_literals(model_arguments.model_kwargs),
        device=str(training.device),
    )
    model.max_seq_length = common.load_tokenizer(model_arguments).model_max_length
    common.choose_trained(model.transformers_model, model_arguments)

    def evaluator(split: str) -> Any:
        """Each query among all documents of the split, of which each is there once."""
        rows = datasets[split]
        texts = dict.fromkeys(rows[document])
        number = {text: str(n) for n, text in enumerate(texts)}
        return evaluation.InformationRetrievalEvaluator(
            queries={str(n): text for n, text in enumerate(rows[query])},
            corpus={number[text]: text for text in texts},
            relevant_docs={str(n): {number[text]} for n, text in enumerate(rows[document])},
            batch_size=training.per_device_eval_batch_size,
            write_csv=False,
        )

    def measure(when: str) -> Iterator[dict[str, Any]]:
        for split in common.held_out(datasets):
            found = {name.split("_", 1)[1]: value for name, value in evaluator(split)(model).items()}
            yield {"model": when, "split": split, **{name: float(found[key]) for key, name in METRICS.items()}}

    rows = list(measure("before" if training.do_train else "as it is"))
    if training.do_train:
        loss = losses.MultipleNegativesRankingLoss(model)
        if data.mini_batch_size:
            loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=data.mini_batch_size)
        trainer = library.SentenceTransformerTrainer(
            model=model,
            args=training,
            train_dataset=datasets["train"].select_columns([query, document]),
            eval_dataset=datasets["validation"].select_columns([query, document]) if "validation" in datasets else None,
            loss=loss,
        )
        common.train(trainer)
        rows += measure("after")
    common.report(training, flags, rows)


if __name__ == "__main__":
    sys.exit(main())
