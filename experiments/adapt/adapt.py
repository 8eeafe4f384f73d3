"""Adapt a converted sentence model to your documents, without labels.

It learns to put a document near passages of its own and apart from the other documents of its batch
(`MultipleNegativesRankingLoss`): no one need say what answers what. With `--do_predict` retrieval is then measured as
in `retrieval/study.py`, on documents that were not trained on, beside the model before and the source's chunks.

    python experiments/adapt/adapt.py --model sentence-transformers/all-MiniLM-L6-v2 --do_train --do_predict \\
        --max_seq_length 1024 --learning_rate 2e-5 --per_device_train_batch_size 8 --output_dir out/adapted
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "retrieval")]

import common
import corpora
import systems
import tables
from study import StudyArguments, readers
from systems import POSITION_INIT, Model, Reader, Study


# Parts of the names of the parameters that are trained; none stands for all of them.
TRAINED = {"all": ("",), "positions": ("position_embeddings", "global_embeddings")}


@dataclass
class AdaptArguments:
    """What is adapted, and to what."""

    model: str = field(metadata={"help": "A sentence model that is not converted yet: a folder, or a name on the Hub."})
    corpus: str = common.flag("Documents: built-in, or a .jsonl file of texts.", corpora.BUILT_IN)
    max_seq_length: int = common.flag("Tokens of a document.", 1024)
    train_documents: int = common.flag("At most so many documents to train on.", 400)
    test_documents: int = common.flag("At most so many others to measure on.", 100)
    queries: int = common.flag("Passages of each document.", 2)
    train: str = common.flag(f"One of {', '.join(TRAINED)}; positions are trained with the global tokens.", "all")
    sparsity_type: str = common.flag("An LSG setting.", "norm")
    block_size: int = common.flag("An LSG setting.", 128)
    num_global_tokens: int = common.flag("An LSG setting.", 0)
    position_init: str = common.flag("How lsg-convert is to lengthen positions.", "tile")


@dataclass
class Adapted(Study):
    """Reads with the model that was trained."""

    trained: Model

    def model(self, reader: Reader) -> Model:
        return self.trained


def halves(corpus: str) -> tuple[list[str], list[str]]:
    """Texts to train on, and others to measure on."""
    if corpus == corpora.BUILT_IN:
        texts = list(corpora.built_in())
    elif Path(corpus).is_file() and "text" in (rows := corpora.read_file(Path(corpus)))[0]:
        texts = [row["text"] for row in rows]
    else:
        raise common.OptionError(f"--corpus: got {corpus!r}; give {corpora.BUILT_IN}, or a .jsonl file of texts")
    random.Random(0).shuffle(texts)
    return texts[::2], texts[1::2]


@common.command
def main(flags: Sequence[str]) -> None:
    datasets = common.need("datasets")
    library = common.need("sentence_transformers")
    losses = common.need("sentence_transformers.sentence_transformer.losses")
    options, training = common.parse([AdaptArguments, library.SentenceTransformerTrainingArguments], flags)
    if options.train not in TRAINED:
        raise common.OptionError(f"--train: got {options.train!r}; give one of {', '.join(TRAINED)}")
    length, device = options.max_seq_length, training.device.type
    plan = StudyArguments(
        model=options.model,
        output=training.output_dir,
        lengths=[length],
        readers=["chunks", "lsg"],
        sparsity_types=[options.sparsity_type],
        block_sizes=[options.block_size],
        num_global_tokens=[options.num_global_tokens],
        position_init=[options.position_init],
        device=device,
    )
    folder = systems.converted(plan, options.position_init, length)
    limit = systems.source_length(folder)
    before = [reader for _, reader in readers(plan, length, limit)]
    setting = {name: value for name, value in before[-1].fields.items() if name != POSITION_INIT}
    model = Model.load(str(folder), device, **setting)
    model.model.max_seq_length = length
    room = length - model.extra("document")
    texts, others = halves(options.corpus)
    train = corpora.with_passages(texts, model.tokenizer, room, options.train_documents, options.queries, begin=0)
    test = corpora.with_passages(others, model.tokenizer, room, options.test_documents, options.queries)
    if not (train.queries and test.queries):
        raise common.OptionError(f"--max_seq_length: no document of {options.corpus!r} gives a passage at {length}")
    study = Study(plan, length, test, limit)
    results = [row for reader in before for row in study.run(reader)] if training.do_predict else []
    if training.do_train:
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED[options.train]))
        # No batch holds a document twice: it would be wrong for a passage of its own.
        training.batch_sampler = common.need("sentence_transformers.base.sampler").BatchSamplers.NO_DUPLICATES
        pairs = {"passage": train.queries, "document": [train.documents[place] for (place,) in train.relevant]}
        common.train(
            library.SentenceTransformerTrainer(
                model=model.model,
                args=training,
                train_dataset=datasets.Dataset.from_dict(pairs),
                loss=losses.MultipleNegativesRankingLoss(model.model),
            )
        )
        model.model.eval()
        if training.do_predict:
            adapted = Reader("adapted LSG", "adapted LSG", "lsg", before[-1].fields, tokens=True)
            results += Adapted(plan, length, test, limit, model).run(adapted)
    if results:
        text = tables.report([study], [(True, row) for row in results], plan.chunk_lengths[0], device)
        (Path(training.output_dir) / "results.md").write_text(text)
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
