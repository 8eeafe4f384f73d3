"""What the fine-tuning scripts share: flags, models, data, what is trained, and the result file.

Each script parses `ModelArguments`, a subclass of `DataArguments`, and Transformers' own `TrainingArguments`.
"""

import hashlib
import importlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, set_seed

import lsg_converter
from lsg_converter.modeling.lsg_config import NEEDS_ITS_CODE
from lsg_converter.options import ConversionError, OptionError, first_line, parse_literals


# What loading a model or a dataset raises for a wrong name, file or field.
FAULTS = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
# Parts of the names of the tables that are trained alone.
TABLES = {
    "globals": ["global_embeddings"],
    "positions": ["global_embeddings", "position_embeddings", "embed_positions"],
}


def flag(text: str, default: Any = None) -> Any:
    """A field of a dataclass of flags."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model_name_or_path: str = field(metadata={"help": "An LSG checkpoint: a folder, or a name on the Hub."})
    trust_remote_code: bool = flag("Run the LSG code that lies beside the weights.", False)
    model_kwargs: str | None = flag("LSG fields to change, as for lsg-convert: \"{'sparsity_type': 'none'}\".")
    train: Literal["all", "globals", "positions", "lora"] = flag(
        "Train all; the global embeddings and the head; these and the positions; or these and a LoRA adapter.", "all"
    )
    lora_rank: int = flag("The rank of the LoRA adapter.", 8)
    max_seq_length: int | None = flag("Tokens of a text that are read; all that the model can unless given.")


@dataclass
class DataArguments:
    """Where the data comes from."""

    dataset_name: str | None = flag("A dataset on the Hub.")
    dataset_config_name: str | None = flag("Its configuration.")
    train_file: str | None = flag("Instead of one on the Hub: a csv, json or jsonl file, for --do_train.")
    validation_file: str | None = flag("The same for --do_eval.")
    test_file: str | None = flag("The same for --do_predict.")
    max_train_samples: int | None = flag("Use the first so many.")
    max_eval_samples: int | None = flag("Use the first so many.")
    max_predict_samples: int | None = flag("Use the first so many.")


@dataclass
class SettingArguments:
    """LSG settings that the trained model is also evaluated with; they need no training of their own."""

    eval_sparsity_types: list[str] | None = field(default=None, metadata={"help": "Sparsity types to evaluate with."})
    eval_block_sizes: list[int] | None = field(
        default=None, metadata={"help": "Block sizes to evaluate with; sparse blocks get the same size."}
    )
    eval_sparsity_factor: int | None = flag("The sparsity factor to evaluate with; the checkpoint's unless given.")

    def settings(self, config: Any) -> list[dict[str, Any]]:
        """The LSG fields of each evaluation. Raises OptionError where a value is not allowed."""
        blocks = self.eval_block_sizes or [config.block_size]
        kinds = self.eval_sparsity_types or [config.sparsity_type]
        factor = config.sparsity_factor if self.eval_sparsity_factor is None else self.eval_sparsity_factor
        if not (self.eval_sparsity_types or self.eval_block_sizes):
            return [{name: getattr(config, name) for name in ("sparsity_type", "block_size")}]
        rows = [
            {"sparsity_type": kind, "block_size": block, "sparse_block_size": block, "sparsity_factor": factor}
            for block in blocks
            for kind in kinds
        ]
        for row in rows:
            try:
                with changed(config, row):
                    config.validate()
            except FAULTS as error:
                raise OptionError(f"--eval_...: {row}: {first_line(error.__cause__ or error)}") from error
        return rows


@contextmanager
def changed(config: Any, values: dict[str, Any]) -> Iterator[None]:
    """Inside, the configuration has these LSG fields: its model reads them anew for each text."""
    before = {name: getattr(config, name) for name in values}
    try:
        vars(config).update(values)
        yield
    finally:
        vars(config).update(before)


# The command


class Parser(HfArgumentParser):
    """Raises OptionError where argparse prints the usage of a hundred flags and ends."""

    def error(self, message: str) -> Any:
        raise OptionError(f"{message}; --help lists the flags")


def parse_flags(kinds: Sequence[Any], flags: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses. Raises OptionError for a wrong flag or value."""
    parser = Parser(kinds, allow_abbrev=False)
    try:
        parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
    except (*FAULTS, ImportError) as error:
        raise OptionError(f"{first_line(error)}; --help lists the flags") from error
    return parsed


def parse(kinds: Sequence[Any], flags: Sequence[str]) -> tuple[Any, ...]:
    """As `parse_flags`, for a script on `Trainer`, whose arguments are among them."""
    parsed = parse_flags(kinds, flags)
    training = next(item for item in parsed if isinstance(item, TrainingArguments))
    if not (training.do_train or training.do_eval or training.do_predict):
        raise OptionError("nothing to do; give --do_train, --do_eval or --do_predict")
    given = training.resume_from_checkpoint
    if given and given.lower() != "true" and not (Path(given) / TRAINER_STATE_NAME).is_file():
        raise OptionError(f"--resume_from_checkpoint: {given!r} is no checkpoint; give one, or true for the last")
    if training.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    set_seed(training.seed)
    return parsed


def command(body: Callable[[Sequence[str]], None]) -> Callable[..., int]:
    """Make of it a command that returns an exit code, and prints one line for a mistake of its user."""

    @wraps(body)
    def main(flags: Sequence[str] | None = None) -> int:
        try:
            body(sys.argv[1:] if flags is None else flags)
        except ConversionError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return error.exit_code
        return 0

    return main


def need(name: str, package: str = ".[experiments]") -> Any:
    """Import a library that not every script needs; `package` is what pip installs it by."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f'{name} is missing; pip install "{package}" brings it') from error


# Models


def check_model(arguments: ModelArguments) -> None:
    """Raise OptionError unless it is an LSG checkpoint whose code may be run."""
    name = arguments.model_name_or_path
    try:
        content, _ = PreTrainedConfig.get_config_dict(name)
    except FAULTS as error:
        raise OptionError(f"--model_name_or_path: {name!r}: {first_line(error)}") from error
    if content.get("attn_implementation") != NEEDS_ITS_CODE:
        convert = ["lsg-convert", "--initial_model", name, "--model_name", f"lsg-{Path(name).name}"]
        length = str(arguments.max_seq_length or 4096)
        raise OptionError(
            f"--model_name_or_path: {name!r} is no LSG checkpoint; convert it, and give what this writes: "
            + shlex.join([*convert, "--max_sequence_length", length])
        )
    if not arguments.trust_remote_code:
        raise OptionError(
            f"--trust_remote_code: it is missing; {name!r} brings code of its own, which this flag runs; "
            "read it first if it is not yours"
        )


def read_config(arguments: ModelArguments, **more: Any) -> Any:
    """The checkpoint's configuration, with the fields that the user changed."""
    check_model(arguments)
    wanted = parse_literals(arguments.model_kwargs)
    try:
        config, unknown = transformers.AutoConfig.from_pretrained(
            arguments.model_name_or_path, trust_remote_code=True, return_unused_kwargs=True, **{**wanted, **more}
        )
    except FAULTS as error:
        raise OptionError(f"--model_kwargs: {first_line(error.__cause__ or error)}") from error
    if extra := unknown.keys() & wanted:
        raise OptionError(f"--model_kwargs: got {', '.join(extra)}; give fields of the model's configuration")
    return config


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; it cuts texts at `max_seq_length`."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    longest = tokenizer.model_max_length
    wanted = longest if arguments.max_seq_length is None else arguments.max_seq_length
    if not tokenizer.num_special_tokens_to_add() < wanted <= longest:
        raise OptionError(f"--max_seq_length: got {wanted}; the checkpoint reads {longest} tokens")
    tokenizer.model_max_length = wanted
    return tokenizer


def load_model(auto_class: Any, arguments: ModelArguments, config: Any, task_type: str | None = None) -> Any:
    """The model, with gradients where `--train` wants them."""
    name = arguments.model_name_or_path
    try:
        model, info = auto_class.from_pretrained(name, config=config, trust_remote_code=True, output_loading_info=True)
    except FAULTS as error:
        raise OptionError(f"--model_name_or_path: {name!r}: {first_line(error)}") from error
    # Their losses are means over a batch, whatever else they take: Trainer must average them over accumulated ones.
    model.accepts_loss_kwargs = False
    return choose_trained(model, arguments, task_type, info["missing_keys"])


def choose_trained(
    model: Any, arguments: ModelArguments, task_type: str | None = "FEATURE_EXTRACTION", new: Any = ()
) -> Any:
    """The model, of which only what `--train` names has gradients; `new` are parameters that begin untrained."""
    if arguments.train == "lora":
        peft = need("peft")
        config = peft.LoraConfig(task_type=task_type, r=arguments.lora_rank, modules_to_save=["global_embeddings"])
        if task_type != "FEATURE_EXTRACTION":
            return peft.get_peft_model(model, config)
        model.add_adapter(config)
    if arguments.train in TABLES:
        inside = f"{model.base_model_prefix}." if model.base_model is not model else ""
        for name, parameter in model.named_parameters():
            chosen = any(table in name for table in TABLES[arguments.train])
            parameter.requires_grad_(chosen or name in new or not name.startswith(inside))
    return model


# Data


def load_splits(data: DataArguments, training: TrainingArguments, *columns: str) -> dict[str, Any]:
    """The splits that are needed, each a `datasets.Dataset` with these columns: train, validation, test."""
    datasets = need("datasets")
    datasets.disable_caching()  # Each run tokenizes anew; no rows of an earlier one are taken.
    if training.disable_tqdm:
        datasets.disable_progress_bars()
    given = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    files = {split: path for split, path in given.items() if path}
    if bool(files) is bool(data.dataset_name):
        raise OptionError("data: give --dataset_name, or files by --train_file, --validation_file and --test_file")
    try:
        if data.dataset_name:
            loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
        else:
            kinds = {Path(path).suffix.lstrip(".").replace("jsonl", "json") for path in files.values()}
            if len(kinds) > 1 or not kinds <= {"csv", "json"}:
                raise OptionError(f"data: got files that end in {', '.join(kinds)}; give all as csv, json or jsonl")
            loaded = datasets.load_dataset(kinds.pop(), data_files=files)
    except (*FAULTS, datasets.exceptions.DatasetsError) as error:
        raise OptionError(f"data: {first_line(error)}") from error
    limits = {
        "train": (training.do_train, "--do_train", data.max_train_samples),
        "validation": (training.do_eval, "--do_eval", data.max_eval_samples),
        "test": (training.do_predict, "--do_predict", data.max_predict_samples),
    }
    result = {}
    for split, (wanted, name, limit) in limits.items():
        if not wanted:
            continue
        if split not in loaded:
            raise OptionError(f"data: {name} needs the split {split!r}; there are {', '.join(loaded)}")
        dataset = loaded[split]
        if missing := [column for column in columns if column not in dataset.column_names]:
            raise OptionError(
                f"data: {split} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}; "
                "the flags that end in _column_name name others"
            )
        result[split] = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return result


def held_out(datasets: dict[str, Any]) -> list[str]:
    """The splits that are measured on."""
    return [split for split in datasets if split != "train"]


def encode(datasets: dict[str, Any], function: Callable[..., Any], **more: Any) -> Any:
    """Each dataset with what `function` makes of its rows, and no other columns."""
    return {
        split: dataset.map(function, remove_columns=dataset.column_names, desc=f"tokenize {split}", **more)
        for split, dataset in datasets.items()
    }


def joined(text: str | list[str]) -> str:
    """A text, which may come as a list of its paragraphs."""
    return text if isinstance(text, str) else "\n".join(text)


# Intervals

DRAWS = 2000
LEVEL = 0.95


def draws(documents: Sequence[int]) -> np.ndarray:
    """Weights of values in each draw, shape (draws, values), given the document of each. Documents are drawn, with
    replacement, and their values with them: those of one document stand or fall together."""
    _, cluster = np.unique(documents, return_inverse=True)
    count = cluster.max() + 1
    chosen = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    weights: np.ndarray = np.stack([np.bincount(row, minlength=count) for row in chosen])[:, cluster]
    return weights


def interval(
    values: Sequence[float] | np.ndarray, weights: np.ndarray, counts: np.ndarray | float = 1.0
) -> tuple[float, float]:
    """The bootstrap interval of the mean, by percentiles; where values are sums, of so many each."""
    means = weights @ np.array(values) / (weights * counts).sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# Training, and what it gives


def train(trainer: Any) -> None:
    """Train, from a checkpoint where one is asked for, and save the model, its tokenizer and the log of losses."""
    given, folder = trainer.args.resume_from_checkpoint, str(trainer.args.output_dir)
    if given and given.lower() == "true":
        given = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if given is None:
            print(f"{folder} holds no checkpoint yet: training starts from the beginning", file=sys.stderr)
    trainer.train(resume_from_checkpoint=given)
    trainer.save_model()
    trainer.save_state()


def evaluate(
    trainer: Any, datasets: dict[str, Any], settings: Sequence[dict[str, Any]] = ({},)
) -> Iterator[dict[str, Any]]:
    """A row of metrics for each split but train, and for each of some LSG settings."""
    left_out = ("_per_second", "_time", "epoch")
    for split in held_out(datasets):
        for setting in settings:
            with changed(trainer.model.config, setting):
                output = trainer.evaluate(datasets[split], metric_key_prefix=split)
            measured = {name: value for name, value in output.items() if not name.endswith(left_out)}
            yield {"split": split, **setting, **{name.removeprefix(f"{split}_"): measured[name] for name in measured}}


def kept(path: Path, mark: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON has it; from the file, where it is there and was made by these versions for the same
    mark, which is all that the result depends on."""
    versions = [platform.python_version(), torch.__version__, transformers.__version__, lsg_converter.__version__]
    fingerprint = hashlib.sha256(json.dumps([mark, versions]).encode()).hexdigest()
    if path.is_file():
        content = json.loads(path.read_text())
        if content["fingerprint"] == fingerprint:
            return content["results"]
    results = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"fingerprint": fingerprint, "results": results}) + "\n")
    temporary.replace(path)
    return results


def write_results(training: TrainingArguments, flags: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write the rows to `results.json`, with what they came from."""
    if training.process_index:
        return
    # Of the fields alone: another instance would reset what the processes share.
    default = {item.name: item.default for item in fields(TrainingArguments)}
    content = {
        "flags": list(flags),
        "seed": training.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lsg_converter": lsg_converter.__version__,
        },
        "training": {name: value for name, value in training.to_dict().items() if value != default.get(name)},
        "results": rows,
    }
    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


def report(training: TrainingArguments, flags: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write the rows to `results.json`, and print them."""
    write_results(training, flags, rows)
    print_table(training, rows)


def print_table(training: TrainingArguments, rows: list[dict[str, Any]]) -> None:
    """The rows as a Markdown table."""
    if training.process_index or not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    texts = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    print("\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *texts]))
