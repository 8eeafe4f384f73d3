"""Does a masked language model use the long texts that a conversion lets it read? Its loss by position.

A small BERT is trained here from scratch, on texts of 128 tokens, and then converted. Masked tokens of long documents
are guessed by the source in chunks and in windows that overlap, by full attention over the same long positions, and by
LSG, with each type of sparsity and each way to lengthen positions; before and after a short adaptation. The published
protocol is tried too: adapt without sparse keys at blocks of 256, then switch to others without more training. Masks
are the same for all. What is measured is kept in --output, so a study that was stopped goes on where it was.

    python experiments/mlm/masked_study.py --output out/masked
"""

import hashlib
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    logging,
)
from transformers.trainer_utils import set_seed


sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "retrieval", "adapt")]

import common
import corpora
import masked_tables
import systems
from adapt import halves
from masked_tables import CHUNKS, Row

from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES
from lsg_converter.tune import GRID, MASKED, check_figure


ALLOWED: dict[str, list[str]] = {
    "sparsity_types": ["none", *(name for name in SPARSITY_TYPES if name != "none")],
    "position_init": GRID["position_init"],
    "parts": ["positions", "lora", "globals"],
}
FREQUENCIES, WINDOWS = "word frequencies", "source, windows of {} that overlap by half"
BLOCKS = (128, 32)
COUNTS = ("layers", "width", "steps", "batch_size", "documents", "adapt_steps", "adapt_batch_size")
PROTOCOL_BLOCK, PROTOCOL_FACTOR = 256, 4  # as the cards of published checkpoints


@dataclass
class MaskedStudyArguments:
    """How large the model is, how long it is trained, and what is measured."""

    output: str = common.flag(
        "The folder of the models, of what is measured, the tables and the picture.", "out/masked"
    )
    corpus: str = common.flag("Documents: built-in, or a .jsonl file of texts.", corpora.BUILT_IN)
    words: int = common.flag("The size of the vocabulary.", 4096)
    layers: int = common.flag("Layers of the source.", 4)
    width: int = common.flag("Its width; a head has 64 of it.", 256)
    source_length: int = common.flag("Tokens that it reads.", 128)
    steps: int = common.flag("Steps that it is trained.", 2500)
    batch_size: int = common.flag("Texts of a step.", 16)
    learning_rate: float = common.flag("Its learning rate.", 1e-3)
    mlm_probability: float = common.flag("The share of tokens that are masked in training; where measured, 0.15.", 0.25)
    lengths: list[int] = common.flag("Tokens to convert to; adaptation is at the largest.", [512, 1024, 2048])
    documents: int = common.flag("At most so many documents to measure on, each from a file of its own.", 48)
    adapt_steps: int = common.flag("Steps of an adaptation.", 100)
    adapt_batch_size: int = common.flag("Texts of such a step, of the largest length.", 2)
    adapt_learning_rate: float = common.flag("The learning rate where all is adapted.", 3e-4)
    part_learning_rate: float = common.flag("The learning rate where a part is.", 3e-3)
    sparsity_types: list[str] = common.flag("LSG settings.", ALLOWED["sparsity_types"])
    position_init: list[str] = common.flag(
        "How lsg-convert is to lengthen positions; all is tried with the first, and the second is adapted too.",
        ALLOWED["position_init"],
    )
    parts: list[str] = common.flag(
        "What of LSG is adapted alone too, as --train of run_mlm.py has it.", ["positions", "lora"]
    )
    fp32: bool = common.flag("Measure in float32, not in bfloat16, which training always is in.", False)
    figure: str | None = common.flag("Where to draw it, a .png; masked.png in --output unless given.")


@dataclass(frozen=True)
class Reader:
    """How documents are read.

    Attributes:
        group, name: the table, and its row.
        length: documents are cut there, and a conversion is to so many tokens.
        room, step: tokens that are read at once, and from one such part to the next.
        position_init: how positions were lengthened; empty for the source.
        fields: of the LSG configuration.
        adapted: the fields with which the model was trained on; None where it was not.
        part: what of it was trained.
    """

    group: str
    name: str
    length: int
    room: int
    step: int
    position_init: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    adapted: dict[str, Any] | None = None
    part: str = "all"


class MaskedTrainer(Trainer):
    """Asks the head for masked tokens alone, which is half of the work of a small model."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        asked = inputs["labels"] != -100
        with self.accelerator.autocast():  # Trainer has it around a model's own call alone
            states = model.base_model(inputs["input_ids"]).last_hidden_state
            return cross_entropy(model.cls(states[asked]).float(), inputs["labels"][asked])


def spans(length: int, room: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Parts of `room` of so many tokens, each `step` behind the last: where one begins, and the tokens that are asked
    there, from and up to, in its middle. Each token is asked once."""
    done = 0
    for begin in range(0, max(length - room, 0) + step, step):
        start = min(begin, max(length - room, 0))
        end = length if start + room >= length else start + (room + step) // 2
        if end > done:
            yield start, done, end
        done = end


class Study:
    """The corpus, its tokens and masks, the source, and what becomes of it."""

    def __init__(self, options: MaskedStudyArguments) -> None:
        self.options, self.folder = options, Path(options.output)
        self.loaded: tuple[Any, Any] | None = None
        self.source, self.longest = self.folder / "models" / "source", max(options.lengths)
        texts, others = halves(options.corpus)
        names = ("words", "layers", "width", "source_length", "steps", "batch_size", "learning_rate", "mlm_probability")
        data = hashlib.sha256(json.dumps([texts, others]).encode()).hexdigest()
        self.mark = [data, *(getattr(options, name) for name in names)]
        self.made = common.kept(self.folder / "models" / "source.json", self.mark, lambda: self.make_source(texts))
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.texts = [self.ids(text) for text in texts]
        found = (ids[: self.longest - 2] for ids in map(self.ids, others) if len(ids) >= self.longest - 2)
        self.documents = [ids for ids, _ in zip(found, range(options.documents), strict=False)]
        if len(self.documents) < 2:
            raise common.OptionError(f"--lengths: {self.longest} tokens have too few texts to measure on; give less")
        draw, room = random.Random(0), self.longest - 2
        self.places = [sorted(draw.sample(range(room), int(MASKED * room))) for _ in self.documents]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def whole(self, ids: list[int]) -> list[int]:
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]

    # Training

    def make_source(self, texts: list[str]) -> dict[str, Any]:
        """Train a tokenizer and the source; how long it took, and its losses."""
        shutil.rmtree(self.folder / "models", ignore_errors=True)  # what was converted from another source
        options, start = self.options, time.process_time()
        self.tokenizer = BertTokenizer().train_new_from_iterator(texts, options.words, show_progress=False)
        self.tokenizer.model_max_length = options.source_length
        self.tokenizer.save_pretrained(self.source)
        self.texts = [self.ids(text) for text in texts]
        set_seed(0)
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=max(options.width // 64, 1),
            intermediate_size=4 * options.width,
            max_position_embeddings=options.source_length,
            hidden_dropout_prob=0.0,  # it reads its texts a few times only
            attention_probs_dropout_prob=0.0,
        )
        size = (options.source_length, options.steps, options.batch_size)
        model, losses = self.train(BertForMaskedLM(config), *size, options.learning_rate)
        model.save_pretrained(self.source)
        return {"seconds": time.process_time() - start, "losses": losses}

    def train(self, model: Any, length: int, steps: int, batch_size: int, rate: float) -> tuple[Any, list[float]]:
        """Train on all texts that have so many tokens, and give the losses on the way."""
        room = length - 2
        pieces = [
            {"input_ids": self.whole(ids[begin : begin + room])}
            for ids in self.texts
            for begin in range(0, len(ids) - room + 1, room)
        ]
        if not pieces:
            raise common.OptionError(f"--lengths: no text to train on has {length} tokens; give less")
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            warmup_steps=steps // 20,
            weight_decay=0.01,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=max(steps // 50, 1),
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=self.options.mlm_probability)
        trainer = MaskedTrainer(model=model, args=arguments, train_dataset=pieces, data_collator=collator)
        trainer.train()
        return model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def load(self, position_init: str, length: int) -> Any:
        """What the source is converted to; the source itself, where there is no way to lengthen positions."""
        if not position_init:
            return AutoModelForMaskedLM.from_pretrained(self.source).eval()
        place = SimpleNamespace(model=str(self.source), output=str(self.folder))
        folder = systems.converted(place, position_init, length)
        return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()

    def model(self, reader: Reader) -> Any:
        """What it reads with, adapted where it says so: the source on texts that it reads, the others on those of the
        greatest length, and on as many tokens."""
        key = (reader.position_init, reader.length, reader.adapted, reader.part)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None
            model, options = self.load(reader.position_init, reader.length), self.options
            if reader.adapted is not None:
                vars(model.config).update(reader.adapted)
                common.choose_trained(model, common.ModelArguments("", train=reader.part))  # type: ignore[arg-type]
                length = self.longest if reader.position_init else options.source_length
                batch_size = options.adapt_batch_size * self.longest // length
                rate = options.adapt_learning_rate if reader.part == "all" else options.part_learning_rate
                model, _ = self.train(model, length, options.adapt_steps, batch_size, rate)
            self.loaded = key, model
        return self.loaded[1]

    # Measuring

    @torch.inference_mode()
    def losses(self, model: Any, reader: Reader) -> list[list[float]]:
        """The loss at each place that is asked of each document, cut at the reader's length, and read in its parts."""
        found = []
        room, length = reader.room - 2, reader.length - 2  # without the special tokens
        parts = list(spans(length, room, reader.step))
        for ids, places in zip(self.documents, self.places, strict=True):
            masked = list(ids)
            for place in places:
                masked[place] = self.tokenizer.mask_token_id
            texts = torch.tensor([self.whole(masked[begin : min(begin + room, length)]) for begin, _, _ in parts])
            asked = [
                (row, place - begin + 1)
                for row, (begin, first, end) in enumerate(parts)
                for place in places
                if first <= place < end
            ]
            half = torch.autocast(model.device.type, torch.bfloat16, enabled=not self.options.fp32)
            with half, common.changed(model.config, reader.fields):
                states = model.base_model(texts.to(model.device)).last_hidden_state
                logits = model.cls(states[tuple(torch.tensor(asked).T)]).float().cpu()
            labels = torch.tensor([ids[place] for place in places if place < length])
            found.append([round(loss, 4) for loss in cross_entropy(logits, labels, reduction="none").tolist()])
        return found

    def frequencies(self) -> list[list[float]]:
        """The loss of who knows nothing but how frequent words are."""
        count = Counter(token for ids in self.texts for token in ids)
        total = sum(count.values()) + len(self.tokenizer)
        return [
            [float(-np.log((count[ids[place]] + 1) / total)) for place in places]
            for ids, places in zip(self.documents, self.places, strict=True)
        ]

    def row(self, reader: Reader) -> Row:
        """What a reader gives, from the folder where it is there."""
        options = self.options
        names = ("adapt_steps", "adapt_batch_size", "adapt_learning_rate", "part_learning_rate")
        more = [getattr(options, name) for name in names if reader.adapted is not None]
        mark = [self.mark, options.documents, options.fp32, self.longest, asdict(reader), more]
        label = "".join(c if c.isalnum() else "-" for c in f"{reader.group} {reader.length} {reader.name}")

        def make() -> list[list[float]]:
            return self.frequencies() if reader.name == FREQUENCIES else self.losses(self.model(reader), reader)

        losses = common.kept(self.folder / "rows" / f"{label}.json", mark, make)
        print(f"{label}: {np.mean([np.mean(item) for item in losses]):.3f}", flush=True)
        return Row(reader.group, reader.name, reader.length, losses)


def lsg(kind: str = "norm", block: int = 128, factor: int = 2) -> dict[str, Any]:
    """The fields of a setting."""
    sizes = {"block_size": block, "sparse_block_size": block, "sparsity_factor": factor, "sparsity_type": kind}
    return {**sizes, "num_global_tokens": 1, "full_attention_length": None}


def readers(options: MaskedStudyArguments) -> Iterator[Reader]:
    """All that is measured, what matters most first."""
    limit, longest = options.source_length, max(options.lengths)
    base, *others = options.position_init

    def whole(group: str, name: str, length: int, fields: dict[str, Any], init: str = base, **more: Any) -> Reader:
        return Reader(group, name, length, length, length, init, fields, **more)

    def source(group: str, room: int, overlap: bool = False, **more: Any) -> Reader:
        name = WINDOWS.format(room) if overlap else CHUNKS.format(room)
        return Reader(group, name, longest, room, (room - 2) // 2 if overlap else room - 2, **more)

    def untrained(length: int) -> Iterator[Reader]:
        full = lsg() | {"num_global_tokens": 0, "full_attention_length": length}
        for init in options.position_init:
            yield whole("untrained", f"full attention, {init}", length, full, init)
            for block in BLOCKS:
                for kind in options.sparsity_types if init == base and length == longest else ["norm"]:
                    name = f"LSG {kind}, block {block}, {init}"
                    yield whole("untrained", name, length, lsg(kind, block), init)

    yield Reader("untrained", FREQUENCIES, longest, longest, longest)
    yield from (source("untrained", room) for room in (limit // 4, limit // 2, limit))
    yield source("untrained", limit, overlap=True)
    yield from untrained(longest)
    yield source("adapted", limit, adapted={})
    yield source("adapted", limit, overlap=True, adapted={})
    local = lsg("none", PROTOCOL_BLOCK)
    yield whole("switched", f"none, block {PROTOCOL_BLOCK}", longest, local, adapted=local)
    for block in BLOCKS:
        for kind in options.sparsity_types:
            fields = lsg(kind, block, PROTOCOL_FACTOR)
            yield whole("switched", f"{kind}, block {block}", longest, fields, adapted=local)
    for block in sorted(BLOCKS):
        fields = lsg("norm", block)
        yield whole("adapted", f"LSG norm, block {block}, {base}", longest, fields, adapted=fields)
    for length in sorted({*options.lengths} - {longest}):
        yield from untrained(length)
    for init in others[:1]:
        yield whole("adapted", f"LSG norm, block 128, {init}", longest, lsg(), init, adapted=lsg())
    full = lsg() | {"num_global_tokens": 0, "full_attention_length": longest}
    yield whole("adapted", f"full attention, {base}", longest, full, adapted=full)
    for part in options.parts:
        yield whole("adapted", f"LSG norm, block 128, {base}, {part}", longest, lsg(), adapted=lsg(), part=part)


@common.command
def main(flags: Sequence[str]) -> None:
    (options,) = common.parse_flags([MaskedStudyArguments], flags)
    for name, allowed in ALLOWED.items():
        if wrong := [value for value in getattr(options, name) if value not in allowed]:
            raise common.OptionError(f"--{name}: got {wrong[0]!r}; give some of {', '.join(allowed)}")
    least = {"source_length": 16, "words": 100, **dict.fromkeys(COUNTS, 1)}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise common.OptionError(f"--{name}: got {getattr(options, name)}; give {value} or more")
    if options.width % max(options.width // 64, 1):
        raise common.OptionError(f"--width: got {options.width}; give a multiple of 64, or less than 128")
    if not 0 < options.mlm_probability < 1:
        raise common.OptionError(f"--mlm_probability: got {options.mlm_probability}; give a share between 0 and 1")
    if min(options.lengths) <= options.source_length:
        raise common.OptionError(
            f"--lengths: got {min(options.lengths)}; the source reads {options.source_length} tokens: give more"
        )
    check_figure(options.figure)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    study = Study(options)
    rows = [study.row(reader) for reader in readers(options)]
    text = masked_tables.report(rows, study.places, options.source_length)
    text += f"\nTraining the source took {study.made['seconds'] / 60:.0f} minutes of the processor.\n"
    (study.folder / "results.md").write_text(text)
    print(text, end="")
    masked_tables.draw(Path(options.figure or study.folder / "masked.png"), rows, study.places, options.source_length)


if __name__ == "__main__":
    sys.exit(main())
