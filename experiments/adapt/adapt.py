"""Adapt a converted sentence model to your documents, without labels.

It learns to put a document near passages of its own and apart from the other documents of its batch
(`MultipleNegativesRankingLoss`); or from what the source makes of the document's chunks, `--objective mean` or `best`:
no one need say what answers what. With `--do_predict` retrieval is then measured as in `retrieval/study.py`, on
documents that were not trained on, beside the model before and the source's chunks. `--adapt source` trains the source
itself in the same way, on documents that it can read, and measures its chunks: what adapting does without LSG.

    python experiments/adapt/adapt.py --model sentence-transformers/all-MiniLM-L6-v2 --do_train --do_predict \\
        --max_seq_length 1024 --learning_rate 2e-5 --per_device_train_batch_size 8 --output_dir out/adapted
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn


sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "retrieval")]

import common
import corpora
import systems
import tables
from corpora import Corpus
from study import StudyArguments, measured, readers
from systems import POSITION_INIT, Model, Reader, Study

from lsg_converter.tune import even


SCALE = 20.0  # of similarities, before a softmax; as in MultipleNegativesRankingLoss


@dataclass
class AdaptArguments:
    """What is adapted, and to what."""

    model: str = field(metadata={"help": "A sentence model that is not converted yet: a folder, or a name on the Hub."})
    corpus: str = common.flag("Documents: built-in, or a .jsonl file of texts.", corpora.BUILT_IN)
    max_seq_length: int = common.flag("Tokens of a document.", 1024)
    train_documents: int = common.flag("At most so many documents to train on.", 400)
    test_documents: int = common.flag("At most so many others to measure on.", 100)
    queries: int = common.flag("Passages of each document.", 2)
    adapt: Literal["long", "source"] = common.flag(
        "The converted model; or the source, on documents it can read.", "long"
    )
    objective: Literal["passages", "mean", "best"] = common.flag(
        "Learn passages of a document; the mean of the source's chunks; or how near the best of them is.", "passages"
    )
    train: Literal["all", "positions", "globals", "lora"] = common.flag(
        "Train all; positions and global tokens; global tokens; or these and a LoRA adapter.", "all"
    )
    lora_rank: int = common.flag("The rank of the LoRA adapter.", 8)
    sparsity_type: str = common.flag("An LSG setting.", "norm")
    block_size: int = common.flag("An LSG setting.", 128)
    num_global_tokens: int = common.flag("An LSG setting.", 0)
    position_init: str = common.flag("How lsg-convert is to lengthen positions.", "tile")
    study: str | None = common.flag(
        "Where what is measured before is kept, for several runs; --output_dir unless given."
    )


@dataclass
class Adapted(Study):
    """Reads with the model that was trained."""

    trained: Model

    def model(self, reader: Reader) -> Model:
        return self.trained


class BestChunk(nn.Module):
    """Among the documents of a batch, a passage is to have the shares that the best chunks of the source give it.

    Args:
        model: a SentenceTransformer.
        scores: of each pair's passage with each pair's document, shape (pairs, pairs); a batch's labels are pairs.
    """

    def __init__(self, model: Any, scores: Tensor) -> None:
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        vectors = [nn.functional.normalize(self.model(part)["sentence_embedding"], dim=-1) for part in features]
        passages, documents = vectors
        found = (SCALE * passages @ documents.T).log_softmax(dim=-1)
        places = labels.cpu()
        wanted = (SCALE * self.scores[places][:, places]).log_softmax(dim=-1).to(found.device)
        return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def halves(corpus: str) -> tuple[list[str], list[str]]:
    """Texts to train on, and others to measure on."""
    if corpus == corpora.BUILT_IN:
        texts = list(corpora.built_in()[0])
    elif Path(corpus).is_file() and "text" in (rows := corpora.read_file(Path(corpus)))[0]:
        texts = [row["text"] for row in rows]
    else:
        raise common.OptionError(f"--corpus: got {corpus!r}; give {corpora.BUILT_IN}, or a .jsonl file of texts")
    random.Random(0).shuffle(texts)
    return texts[::2], texts[1::2]


def pairs_of(corpus: Corpus, source: Model | None, limit: int, objective: str) -> tuple[dict[str, list[Any]], Tensor]:
    """The passages of a corpus and their documents, in columns; beside them, what `source` makes of these, where the
    objective is to learn it: the vectors of a passage and of its document's chunks, in a column `label`, or the scores
    of all pairs, to which the labels are places."""
    places = [place for (place,) in corpus.relevant]
    columns: dict[str, list[Any]] = {
        "passage": corpus.queries,
        "document": [corpus.documents[place] for place in places],
    }
    if source is None:
        return columns, torch.empty(0)
    rooms = {role: limit - source.extra(role) for role in ("query", "document")}
    asked = [source.words(text)[: rooms["query"]] for text in corpus.queries]
    passages = torch.stack([vector for vector, _ in source.read(asked, "query", 1)])
    chunks = [even(source.words(text), rooms["document"]) for text in corpus.documents]
    kept = [torch.stack([vector for vector, _ in source.read(parts, "document", 1)]) for parts in chunks]
    if objective == "mean":
        means = torch.stack([systems.normal(vectors.mean(dim=0)) for vectors in kept])
        columns["label"] = torch.stack([passages, means[places]], dim=1).tolist()
        return columns, torch.empty(0)
    columns["label"] = list(range(len(places)))
    return columns, torch.stack([(passages @ vectors.T).amax(dim=-1) for vectors in kept], dim=-1)[:, places]


@common.command
def main(flags: Sequence[str]) -> None:
    datasets = common.need("datasets")
    library = common.need("sentence_transformers")
    losses = common.need("sentence_transformers.sentence_transformer.losses")
    options, training = common.parse([AdaptArguments, library.SentenceTransformerTrainingArguments], flags)
    if options.adapt == "source" and options.objective != "passages":
        raise common.OptionError(
            f"--objective: got {options.objective!r}, for which the source is the model to learn from"
        )
    length, device = options.max_seq_length, training.device.type
    plan = StudyArguments(
        model=options.model,
        output=options.study or training.output_dir,
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
    source = Model.load(options.model, device)
    of_source = options.adapt == "source"
    model = source if of_source else Model.load(str(folder), device, **setting)
    model.model.max_seq_length = limit if of_source else length
    rooms = [tokens - model.extra("document") for tokens in (model.model.max_seq_length, length)]
    count = options.train_documents * length // model.model.max_seq_length  # as many tokens
    texts, others = halves(options.corpus)
    train = corpora.with_passages(texts, model.tokenizer, rooms[0], count, options.queries, begin=0)
    test = corpora.with_passages(others, model.tokenizer, rooms[1], options.test_documents, options.queries)
    if not (train.queries and test.queries):
        raise common.OptionError(f"--max_seq_length: no document of {options.corpus!r} gives a passage at {length}")
    study = Study(plan, length, test, limit)
    results = [row for reader in before for row in measured(study, reader)] if training.do_predict else []
    if training.do_train:
        pairs, scores = pairs_of(train, None if options.objective == "passages" else source, limit, options.objective)
        common.choose_trained(model.model.transformers_model, options)
        loss = {
            "passages": losses.MultipleNegativesRankingLoss,
            "mean": losses.EmbedDistillLoss,
            "best": lambda sentences: BestChunk(sentences, scores),
        }[options.objective](model.model)
        # No batch holds a document twice: it would be wrong for a passage of its own.
        training.batch_sampler = common.need("sentence_transformers.base.sampler").BatchSamplers.NO_DUPLICATES
        common.train(
            library.SentenceTransformerTrainer(
                model=model.model, args=training, train_dataset=datasets.Dataset.from_dict(pairs), loss=loss
            )
        )
        model.model.eval()
        if training.do_predict:
            for reader in before[:-1] if of_source else before[-1:]:
                adapted = replace(reader, name=f"adapted {reader.title}", title=f"adapted {reader.title}")
                results += Adapted(plan, length, test, limit, model).run(adapted)
    if results:
        text = tables.report([study], [(True, row) for row in results], plan.chunk_lengths[0], device)
        (Path(training.output_dir) / "results.md").write_text(text)
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
