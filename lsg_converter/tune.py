"""Which settings of a conversion suit a model and some texts: each is tried on them, and no labels are needed.

What is measured depends on what the model becomes. A sentence model is to find the text that a passage is from, which
stands beyond what the source reads. A masked head is to guess tokens there. A classifier is to say what it says with
full attention over the same positions. One conversion serves all settings that share its positions: the others are
fields of the configuration, which a model reads anew for each text.
"""

import copy
import itertools
import json
import random
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F

from . import families
from .companions import sentence_class
from .conversion import convert
from .modeling.lsg_sparsity import SPARSITY_TYPES
from .options import ConversionOptions, OptionError, SourceError, TuneOptions, first_line
from .source import ConvertedError, Source
from .verify import Announce


Setting = dict[str, Any]

# What is tried. The first of each is what a conversion does unless told otherwise, and what matters more stands first.
GRID: dict[str, list[Any]] = {
    "exact": [False, True],
    "num_global_tokens": [1, 0],
    "position_init": ["tile", "stretch", "interpolate"],
    "block_size": [128, 64, 32, 256],
    "sparsity_type": ["norm", "none", *(name for name in SPARSITY_TYPES if name not in ("norm", "none"))],
    "sparsity_factor": [2, 4, 8],
}
PASSAGE, PER_TEXT, DROPPED = 60, 4, 1 / 3  # tokens of a passage, passages of a text, a share of a passage's words
MASKED = 0.15  # a share of the tokens beyond what the source reads
BASE = {name: values[0] for name, values in GRID.items()}
NOISE = 2.0  # so many standard errors of a difference are not told from none


@dataclass(frozen=True)
class Measured:
    """What one way of reading gave: by metric, a value for each text; and the seconds for a text."""

    values: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True)
class Row:
    """A line of the result; `setting` is None for what settings are compared with."""

    name: str
    setting: Setting | None
    metrics: dict[str, float]
    seconds: float
    values: list[float] = field(repr=False)  # of the metric that decides, by text


@dataclass
class Tuning:
    """What was tried, and what to convert with.

    Attributes:
        measured: what the metrics are of, in words.
        higher: whether more of the first metric is better.
        not_reached: settings for which there was no time.
        left_out: settings that cannot be, with the reason.
        best: the name of the row that is chosen.
        told_apart: the names of settings that are worse than the best one by more than noise.
        command: the line that converts with it.
    """

    options: TuneOptions
    measured: str
    metrics: list[str]
    higher: bool
    rows: list[Row] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    best: str = ""
    told_apart: list[str] = field(default_factory=list)
    command: str = ""

    def content(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)


def tune(options: TuneOptions, announce: Announce = lambda step: None) -> Tuning:
    """Try settings on texts until the time is up, and choose one.

    Raises:
        ConversionError: one line that says what to do.
    """
    start = time.perf_counter()
    figure = check_figure(options.figure)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(options, Path(folder))
        task = kind_of(models)(models, read_texts(options))
        axes = grid(options, task)
        base = next(settings(axes, cross=False))
        result = Tuning(options, task.measured, list(task.metrics), task.higher)

        def add(name: str, setting: Setting | None, measured: Measured) -> None:
            metrics = {metric: float(np.mean(measured.values[metric])) for metric in task.metrics}
            result.rows.append(Row(name, setting, metrics, measured.seconds, measured.values[task.metrics[0]]))

        def plan() -> Iterator[Setting]:
            yield from settings(axes, options.cross)
            combined = combine(base, result.rows, task.higher)
            if describe(combined, base) not in [row.name for row in result.rows]:
                yield combined

        for name, measured in task.controls(base, announce):
            add(name, None, measured)
        longest = 0.0
        for setting in plan():
            name, before = describe(setting, base), time.perf_counter()
            if setting != base and before + longest - start > 60 * options.minutes:
                result.not_reached.append(name)
                continue
            announce(f"reading with {name}")
            try:
                add(name, setting, task.measure(setting))
            except OptionError as error:
                if setting == base:
                    raise
                result.left_out[name] = str(error)
            longest = max(longest, time.perf_counter() - before)
    tried = [row for row in result.rows if row.setting is not None]
    chosen, result.told_apart = choose(tried, task.higher)
    result.best, result.command = chosen.name, command(options, chosen.setting or {})
    if figure:
        draw(figure, result)
    return result


def settings(axes: dict[str, list[Any]], cross: bool) -> Iterator[Setting]:
    """The base, made of the first values; then those that differ in one, or all combinations."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    base = rows[0]

    def changed(row: Setting) -> list[int]:
        return [place for place, name in enumerate(axes) if row[name] != base[name]]

    for row in sorted(rows, key=lambda row: (len(changed(row)), changed(row))):
        # Without global tokens from `exact`, their number makes no difference.
        same = row["exact"] and row["num_global_tokens"] != base["num_global_tokens"]
        if not same and (cross or len(changed(row)) < 2):
            yield row


def describe(setting: Setting, base: Setting) -> str:
    """A setting by what differs from the base."""
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value != base[name]) or "base"


def combine(base: Setting, rows: Sequence[Row], higher: bool) -> Setting:
    """The best value of each axis, of those that were tried alone and are better than the base's by more than noise."""
    result = dict(base)
    for name, value in base.items():
        alone = [row for row in rows if row.setting is not None and {**row.setting, name: value} == base]
        result[name] = (choose(alone, higher)[0].setting or base)[name]
    return result


def choose(rows: Sequence[Row], higher: bool) -> tuple[Row, list[str]]:
    """The first of the rows that cannot be told from the best one, and the names of those that can: the best one is
    better than they are by more than `NOISE` standard errors, over the same texts."""
    sign = 1 if higher else -1
    best = max(rows, key=lambda row: sign * float(np.mean(row.values)))
    apart = []
    for row in rows:
        difference = sign * (np.array(best.values) - np.array(row.values))
        if difference.mean() > NOISE * difference.std(ddof=1) / len(difference) ** 0.5:
            apart.append(row.name)
    return next(row for row in rows if row.name not in apart), apart


def command(options: TuneOptions, setting: Setting) -> str:
    """The line that converts with a setting."""
    flags = {
        "initial_model": options.initial_model,
        "model_name": f"lsg-{Path(options.initial_model).name}",
        "max_sequence_length": options.max_sequence_length,
        "architecture": options.architecture,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    if setting["position_init"] != "tile":
        words += ["--position_init", setting["position_init"]]
    usual = changes(BASE)
    fields = {name: value for name, value in changes(setting).items() if value != usual[name]}
    if setting["exact"]:
        words.append("--exact")
        fields.pop("num_global_tokens", None)
    return shlex.join(["lsg-convert", *words, *(["--model_kwargs", json.dumps(fields)] if fields else [])])


def changes(setting: Setting) -> dict[str, Any]:
    """The fields of the configuration that a setting changes, but for what `--exact` knows of the source."""
    fields = {name: value for name, value in setting.items() if name not in ("exact", "position_init")}
    fields["sparse_block_size"] = fields["block_size"]
    if setting["exact"]:
        fields["num_global_tokens"] = 0
    return fields


def grid(options: TuneOptions, task: "Task") -> dict[str, list[Any]]:
    """The values of each axis. Raises OptionError where the user's are none, or name no axis."""
    given = options.grid if isinstance(options.grid, dict) else {}
    for name, values in given.items():
        if name not in GRID:
            raise OptionError(f"--grid: got {name!r}; give lists of {', '.join(GRID)}")
        if not isinstance(values, list) or not values:
            raise OptionError(f"--grid: got {values!r} for {name}; give a list of values")
        for value in values:
            known = GRID[name]
            if type(value) is not type(known[0]) or (isinstance(value, str) and value not in known):
                wanted = "whole numbers" if type(known[0]) is int else f"some of {', '.join(map(str, known))}"
                raise OptionError(f"--grid: got {value!r} for {name}; give {wanted}")
    axes = {name: given.get(name, values) for name, values in {**GRID, **task.narrower}.items()}
    for name in task.narrower:
        if len(axes[name]) > 1:
            raise OptionError(
                f"--grid: got {axes[name]} for {name}; give one: without labels nothing says which is right"
            )
    return axes


def read_texts(options: TuneOptions) -> list[str]:
    """The user's texts, in the order of their files. Raises OptionError."""
    path = Path(options.texts).expanduser()
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    try:
        contents = [file.read_text(encoding="utf-8") for file in files]
        if path.suffix == ".jsonl":
            contents = [json.loads(line)["text"] for line in contents[0].splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--texts: {options.texts!r}: {first_line(error)}; give a folder of .txt and .md files, one such "
            "file, or a .jsonl file with a text in each line"
        ) from error
    if not contents or not all(isinstance(text, str) for text in contents):
        raise OptionError(f"--texts: {options.texts!r} holds no texts; give .txt or .md files, or a .jsonl file")
    return contents


def check_figure(figure: str | None) -> Path | None:
    """Where the picture goes. Raises OptionError before anything is read, rather than after all of it."""
    if figure is None:
        return None
    if find_spec("matplotlib") is None:
        raise OptionError('--figure: matplotlib is missing; pip install ".[figures]" brings it, or leave the flag out')
    path = Path(figure).expanduser()
    if not path.parent.is_dir():
        raise OptionError(f"--figure: there is no folder {str(path.parent)!r}; make it, or give another name")
    return path


class Models:
    """The source, and what it becomes: converted once for each way to lengthen positions, and loaded again for it."""

    def __init__(self, options: TuneOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.source = Source(self.conversion("tile"))
        except ConvertedError as error:
            raise OptionError(
                f"--initial_model: {options.initial_model!r} is an LSG checkpoint already; give the model that it was "
                "made from"
            ) from error
        if self.source.tokenizer is None or not self.source.tokenizer.is_fast:
            raise SourceError(f"--initial_model: {options.initial_model!r} has no fast tokenizer; save one beside it")
        self.length, self.limit = options.max_sequence_length, self.source.positions
        self.extra = self.source.tokenizer.num_special_tokens_to_add()
        if self.length < (least := self.limit + PASSAGE + self.extra):
            raise OptionError(
                f"--max_sequence_length: got {self.length}; the source reads {self.limit} tokens: give {least} or more"
            )
        self.sentences = sentence_class(self.source.folder) == "SentenceTransformer" and options.architecture is None
        self.loaded: tuple[str, Any] | None = None

    def conversion(self, position_init: str) -> ConversionOptions:
        return ConversionOptions(
            initial_model=self.options.initial_model,
            model_name=str(self.folder / position_init),
            max_sequence_length=self.options.max_sequence_length,
            architecture=self.options.architecture,
            position_init=position_init,  # type: ignore[arg-type]
            no_verify=True,
        )

    def load(self, setting: Setting, full: bool = False) -> Any:
        """The model with a setting, or with full attention over its positions. Raises OptionError where it has none."""
        position_init = setting["position_init"]
        if self.loaded is None or self.loaded[0] != position_init:
            self.loaded = None
            folder = self.folder / str(position_init)
            if not folder.is_dir():
                report = convert(self.conversion(position_init))
                if report.new_weights and not self.sentences:
                    raise OptionError(
                        f"--architecture: the source has no weights {report.new_weights[0]} for {report.architecture}, "
                        "so there is nothing to measure; give a class whose head is trained"
                    )
                self.auto_class = report.auto_class
            if self.sentences:
                model = load_sentences(str(folder), self.device, self.length)
            else:
                auto_class = families.auto_class(self.auto_class)
                model = auto_class.from_pretrained(folder, trust_remote_code=True).to(self.device).eval()
            self.loaded = str(position_init), model
        model = self.loaded[1]
        config = (model.transformers_model if self.sentences else model).config
        fields = changes(setting) | {"full_attention_length": self.limit if setting["exact"] else None}
        if full:
            fields |= {"num_global_tokens": 0, "full_attention_length": self.length}
        trial = copy.copy(config)
        vars(trial).update(fields)
        try:
            trial.validate()
        except StrictDataclassError as error:
            raise OptionError(f"--grid: {first_line(error.__cause__ or error)}") from error
        vars(config).update(fields)
        return model


def load_sentences(folder: str, device: str, length: int) -> Any:
    """A sentence model that reads so many tokens. Raises OptionError where the library is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise OptionError(
            "--initial_model: it is a sentence model, and sentence_transformers is missing; pip install "
            "sentence-transformers"
        ) from error
    model = SentenceTransformer(folder, device=device, trust_remote_code=True)
    model.max_seq_length = length
    return model


# What is measured


class Task:
    """What a kind of model is measured by.

    Attributes:
        measured: the measure, in words.
        metrics: the first one decides.
        higher: whether more of it is better.
        narrower: axes that have one value for this kind, this unless another is given.
    """

    measured: str
    metrics: tuple[str, ...]
    higher = False
    narrower: dict[str, list[Any]] = {}

    def __init__(self, models: Models, texts: list[str]) -> None:
        self.models = models
        tokenizer: Any = models.source.tokenizer
        self.tokenizer, self.draw = tokenizer, random.Random(0)
        least = models.limit + PASSAGE
        ids = tokenizer("a", verbose=False)["input_ids"]
        word = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        place = ids.index(word[0])
        self.front, self.back = ids[:place], ids[place + len(word) :]
        found = []
        for text in texts:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            room = self.room(models.length)
            spans = [span for span in encoded["offset_mapping"] if span[0] < span[1]][:room]
            if len(spans) >= least:
                found.append((text, encoded["input_ids"][:room], spans))
        self.texts = found[: models.options.max_texts]  # each with its tokens, and where they stand in it
        if len(found) < 2:  # One says nothing of noise.
            raise OptionError(
                f"--texts: got {len(found)} of at least {least} tokens; the source reads {models.limit} as it is: give "
                "2 or more long ones"
            )
        self.prepare()

    def room(self, tokens: int) -> int:
        """How many tokens of a text there are room for."""
        return tokens - self.models.extra

    def prepare(self) -> None:
        """Make what is asked of each text."""

    def controls(self, base: Setting, announce: Announce) -> Iterator[tuple[str, Measured]]:
        """What settings are compared with, by name; full attention is over the positions of the base."""
        announce("reading with full attention")
        whole = self.measure(base, full=True)
        announce("reading with the source")
        yield from self.of_source()
        yield "full attention", whole

    def of_source(self) -> Iterator[tuple[str, Measured]]:
        """What the source itself gives, by name."""
        raise NotImplementedError

    def measure(self, setting: Setting, full: bool = False) -> Measured:
        """Read all texts with a setting, or with full attention over its positions."""
        return self.read(self.models.load(setting, full), self.models.length)[0]

    def read(self, model: Any, length: int) -> Sequence[Measured]:
        """Read all texts, with a model that reads `length` tokens."""
        raise NotImplementedError

    @torch.inference_mode()
    def logits(self, model: Any, ids: list[int]) -> Tensor:
        """What a head says of a text, to which the special tokens are added."""
        inputs = torch.tensor([[*self.front, *ids, *self.back]], device=self.models.device)
        output: Tensor = model(input_ids=inputs).logits[0].float().cpu()
        return output

    def clock(self) -> float:
        """Seconds of this process alone, so that other work on the machine counts little; on a GPU, of the clock."""
        return time.process_time() if self.models.device == "cpu" else time.perf_counter()

    def stock(self) -> Any:
        """The source's own model."""
        model: Any = self.models.source.load()[0]
        return model.to(self.models.device).eval()


class Retrieval(Task):
    """Which text is a passage from, of which a third of the words are dropped?"""

    measured = "texts found by passages of theirs, from beyond what the source reads"
    metrics = ("MRR", "recall@1")
    higher = True

    def prepare(self) -> None:
        self.passages, self.relevant = [], []
        for place, (text, _, spans) in enumerate(self.texts):
            for _ in range(PER_TEXT):
                start = self.draw.randrange(self.models.limit, len(spans) - PASSAGE + 1)
                words = text[spans[start][0] : spans[start + PASSAGE - 1][1]].split()
                kept = sorted(self.draw.sample(range(len(words)), len(words) - int(len(words) * DROPPED)))
                self.passages.append(" ".join(words[place] for place in kept))
                self.relevant.append(place)

    def of_source(self) -> Iterator[tuple[str, Measured]]:
        limit = self.models.limit
        source = load_sentences(str(self.models.source.folder), self.models.device, limit)
        yield f"source, first {limit} tokens", self.read(source, self.models.length)[0]
        best, mean = self.read(source, limit)
        yield f"source, mean of chunks of {limit}", mean
        yield f"source, best chunk of {limit}", best

    def read(self, model: Any, length: int) -> Sequence[Measured]:
        """What is found by the best vector of a text's parts, and by their mean."""
        arguments = {"convert_to_tensor": True, "show_progress_bar": False, "normalize_embeddings": True}
        parts = [
            [text[part[0][0] : part[-1][1]] for part in even(spans, self.room(length))] for text, _, spans in self.texts
        ]
        start = self.clock()
        vectors = [model.encode_document(part, batch_size=1, **arguments).float().cpu() for part in parts]
        seconds = (self.clock() - start) / len(parts)
        asked = model.encode_query(self.passages, **arguments).float().cpu()
        best = torch.stack([(asked @ kept.T).amax(dim=-1) for kept in vectors], dim=-1)
        mean = asked @ torch.stack([F.normalize(kept.mean(dim=0), dim=-1) for kept in vectors]).T
        return Measured(self.found(best), seconds), Measured(self.found(mean), seconds)

    def found(self, scores: Tensor) -> dict[str, list[float]]:
        """By metric, a value for each text, the mean over its passages; `scores` has shape (passages, texts)."""
        own = scores[torch.arange(len(scores)), torch.tensor(self.relevant)]
        rank = (scores > own[:, None]).sum(dim=-1) + 1
        values = {"MRR": 1 / rank, "recall@1": (rank == 1).double()}
        return {name: value.view(-1, PER_TEXT).mean(dim=-1).tolist() for name, value in values.items()}


class Masked(Task):
    """How well are tokens guessed that stand beyond what the source reads?"""

    measured = "loss of masked tokens beyond what the source reads"
    metrics = ("loss",)

    def prepare(self) -> None:
        self.asked: list[tuple[list[int], list[int], list[int]]] = []  # ids with masks, places, the tokens there
        if self.tokenizer.mask_token_id is None:
            raise SourceError(f"--initial_model: {self.models.options.initial_model!r} has no mask token; add it")
        for _, ids, _ in self.texts:
            far = range(self.models.limit, len(ids))
            places = sorted(self.draw.sample(far, max(int(MASKED * len(far)), 1)))
            masked = list(ids)
            for place in places:
                masked[place] = self.tokenizer.mask_token_id
            self.asked.append((masked, places, [ids[place] for place in places]))

    def of_source(self) -> Iterator[tuple[str, Measured]]:
        yield f"source, chunks of {self.models.limit}", self.read(self.stock(), self.models.limit)[0]

    def read(self, model: Any, length: int) -> Sequence[Measured]:
        """The loss in each text."""
        losses, start, front = [], self.clock(), len(self.front)
        for ids, places, tokens in self.asked:
            parts = even(ids, self.room(length))
            logits = [self.logits(model, part)[front : front + len(part)] for part in parts]
            losses.append(float(F.cross_entropy(torch.cat(logits)[places], torch.tensor(tokens))))
        return [Measured({"loss": losses}, (self.clock() - start) / len(self.asked))]


class Classes(Task):
    """Does it say what it says with full attention over the same positions?"""

    measured = "what differs from full attention over the same positions"
    metrics = ("KL divergence", "agreement")
    # Each way to lengthen positions has full attention of its own: without labels nothing says which is right.
    narrower = {"position_init": ["tile"]}

    def prepare(self) -> None:
        self.wanted: list[Tensor] = []  # what full attention says of each text

    def measure(self, setting: Setting, full: bool = False) -> Measured:
        if not self.wanted:
            whole = self.models.load(setting, full=True)
            self.wanted = [self.shares(whole, ids) for _, ids, _ in self.texts]
        return super().measure(setting, full)

    def of_source(self) -> Iterator[tuple[str, Measured]]:
        if "SequenceClassification" in self.models.source.lsg_class.__name__:
            yield f"source, first {self.models.limit} tokens", self.read(self.stock(), self.models.limit)[0]

    def shares(self, model: Any, ids: list[int]) -> Tensor:
        """Logarithms of the shares of classes, shape (..., classes); of each label, where a text may have several."""
        logits = self.logits(model, ids)
        if logits.shape[-1] == 1 or model.config.problem_type == "multi_label_classification":
            return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)
        return logits.log_softmax(dim=-1)

    def read(self, model: Any, length: int) -> Sequence[Measured]:
        """How what is said of the first `length` tokens of each text differs."""
        start = self.clock()
        found = [self.shares(model, ids[: self.room(length)]) for _, ids, _ in self.texts]
        seconds = (self.clock() - start) / len(found)
        pairs = list(zip(found, self.wanted, strict=True))
        kl = [float(F.kl_div(a, b, reduction="none", log_target=True).sum(dim=-1).mean()) for a, b in pairs]
        same = [float((a.argmax(dim=-1) == b.argmax(dim=-1)).double().mean()) for a, b in pairs]
        return [Measured({"KL divergence": kl, "agreement": same}, seconds)]


def even(items: Any, room: int) -> list[Any]:
    """A sequence in as few parts as can be, one at least, of at most `room` items each and of one size, to one item: a
    short rest would weigh as much in a mean of chunks as what it is the rest of."""
    count = max(-(-len(items) // room), 1)
    edges = [place * len(items) // count for place in range(count + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(edges)]


def kind_of(models: Models) -> type[Task]:
    """What its kind is measured by. Raises OptionError where there is nothing."""
    name = models.source.lsg_class.__name__
    if models.sentences:
        return Retrieval
    if name.endswith("ForMaskedLM"):
        return Masked
    if name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return Classes
    raise OptionError(
        f"--architecture: {name} has nothing that can be measured without labels; give a class that ends in "
        "ForMaskedLM, ForSequenceClassification or ForTokenClassification, or a model of sentence-transformers"
    )


def draw(path: Path, result: Tuning) -> None:
    """Quality against cost: a point a row, those that cannot be told from the best filled, the chosen one ringed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=160, layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(result.rows, start=1):
        x, y = row.seconds, row.metrics[result.metrics[0]]
        color = "#D55E00" if row.setting is None else "#0072B2"
        filled = row.setting is not None and row.name not in result.told_apart
        marker = "s" if row.setting is None else "o"
        face = color if filled else "white"
        axes.plot(x, y, marker, color=color, markerfacecolor=face, linestyle="none", label=f"{number}  {row.name}")
        if row.name == result.best:
            axes.plot(x, y, "o", color="black", markerfacecolor="none", markersize=12)
        place = (6, 6) if number % 2 else (-6, -14)  # so that the numbers of neighbours stand apart
        axes.annotate(str(number), (x, y), xytext=place, textcoords="offset points", fontsize=8)
    axes.set_xlabel("seconds for a text, of the processor on a CPU")
    axes.set_ylabel(f"{result.metrics[0]} ({'more' if result.higher else 'less'} is better)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
