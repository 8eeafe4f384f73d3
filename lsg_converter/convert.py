"""The story of a conversion: read, build, operate, write, verify."""

import tempfile
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import families, surgery, verify
from .checkpoint import Source, first_line, staged, write_tokenizer
from .options import ConversionOptions, OptionError, parse_literals


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        options: what was asked for.
        model_type, architecture: the family, and the class of the written model.
        auto_class: the class of Transformers that loads it.
        lsg: the LSG fields of its configuration.
        has_tokenizer: whether a tokenizer was written.
        source_positions, positions: tokens that the source could read, and that the written model can.
        new_weights, dropped_weights: names of weights that a change of head made or left out.
        warnings: what a user should know.
        checks: what was verified, from disk.
        heads: what `run_test` ran.
    """

    options: ConversionOptions
    model_type: str
    architecture: str
    auto_class: str
    lsg: dict[str, Any]
    has_tokenizer: bool
    source_positions: int
    positions: int
    new_weights: list[str] = field(default_factory=list)
    dropped_weights: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checks: list[verify.Check] = field(default_factory=list)
    heads: list[verify.HeadRun] = field(default_factory=list)


def convert(options: ConversionOptions, announce: verify.Announce = lambda step: None) -> ConversionReport:
    """Convert a model, write it to `options.model_name`, and prove what was written.

    Args:
        options: what to convert, and how.
        announce: is told what is done next, in a few words.

    Returns:
        What was done and checked.

    Raises:
        ConversionError: one line that says what to do; then nothing is left behind.
    """
    announce("reading the source")
    source = Source(options)
    config = lsg_config(source)
    report = ConversionReport(
        options=options,
        model_type=source.family.model_type,
        architecture=source.lsg_class.__name__,
        auto_class=source.family.auto_class(source.lsg_class),
        lsg={name: getattr(config, name) for name in source.family.lsg_fields},
        has_tokenizer=source.tokenizer is not None,
        source_positions=source.positions,
        positions=options.max_sequence_length,
        warnings=list(source.warnings),
    )
    if report.positions < report.source_positions:
        lost = report.source_positions - report.positions
        report.warnings.append(f"the last {lost} of the source's {report.source_positions} positions are lost")
    if not report.has_tokenizer:
        report.warnings.append("the source has no tokenizer, so none was written")

    with staged(options.model_name) as folder:
        original, report.new_weights, report.dropped_weights = source.load()
        announce("building the long model")
        model = assemble(source, config, {**original.state_dict(), **long_tables(source, original)})
        if model.can_generate():
            model.generation_config = original.generation_config
        announce("writing")
        model.save_pretrained(folder)
        del original, model
        if source.tokenizer is not None:
            write_tokenizer(source.tokenizer, folder, options.max_sequence_length)

        report.checks += verify.checks(source, folder, announce)
        if options.run_test:
            report.heads += verify.run_heads(source, folder, announce)
    return report


def lsg_config(source: Source) -> Any:
    """The configuration of the converted model. Raises OptionError where a field is not allowed."""
    options, base_class = source.options, source.family.base_class
    kwargs = parse_literals(options.model_kwargs)
    known = source.family.lsg_fields
    for name in kwargs:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"--model_kwargs: got an unknown field {name!r}; {hint}")
    changes = {
        **kwargs,
        "max_position_embeddings": options.max_sequence_length + base_class.counted_positions(source.config),
        "auto_map": source.family.auto_map,
    }
    try:
        return source.family.config_class.from_dict({**source.config.to_dict(), **changes})
    except StrictDataclassError as error:
        raise OptionError(f"--model_kwargs: {first_line(error.__cause__ or error)}") from error


def long_tables(source: Source, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tables of `model`, which was loaded from `source`, that change, by name."""
    options, base_class, state = source.options, source.family.base_class, model.state_dict()
    special, length = source.special_positions, options.max_sequence_length
    names = [name for table in base_class.position_tables if (name := source.prefix + table) in state]
    if base_class.sinusoidal_positions:
        width, dtype = state[names[0]].shape[1], state[names[0]].dtype
        tables = {name: surgery.sinusoidal_positions(length, width, dtype) for name in names}
    else:
        tables = {name: surgery.longer_positions(state[name], length, special) for name in names}
    global_name = source.prefix + base_class.global_table
    if source.prefix + base_class.position_tables[0] in state and not options.resize_lsg:
        table = surgery.global_embeddings(
            state[names[0]][special:],
            source.global_words(model),
            source.token_type(state),
            options.global_positional_stride,
        )
        if options.keep_first_global_token:
            table = torch.cat([state[global_name][:1], table[1:]])
        tables[global_name] = table
    return tables


def assemble(source: Source, config: Any, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The LSG model with the weights `state`, which it shares."""
    with torch.device("meta"):
        model = source.lsg_class(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # With this, saving the model writes its code beside its weights.
    model.register_for_auto_class(source.family.auto_class(source.lsg_class))
    return model


class LSGConverter:
    """Converts models for texts of `max_sequence_length` tokens."""

    def __init__(self, max_sequence_length: int = 4096) -> None:
        self.max_sequence_length = max_sequence_length

    def convert_from_pretrained(
        self, initial_model: str, **kwargs: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Convert a model of the Hub or of a folder.

        Args:
            initial_model: its name, or the folder.
            kwargs: arguments of `ConversionOptions`, such as `architecture`, and LSG fields of the configuration, such
                as `num_global_tokens=7`.

        Returns:
            The model and its tokenizer (None where the source has none). `save_pretrained` writes a checkpoint that
            loads without this package.

        Raises:
            ConversionError: where the model cannot be converted.
        """
        known = {item.name for item in fields(ConversionOptions)}
        given = {name: value for name, value in kwargs.items() if name in known}
        lsg = {name: value for name, value in kwargs.items() if name not in known}
        given["model_kwargs"] = {**parse_literals(given.get("model_kwargs")), **lsg}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, f"lsg-{Path(initial_model).name}")
            options = ConversionOptions(
                initial_model=initial_model,
                model_name=str(target),
                max_sequence_length=self.max_sequence_length,
                **given,
            )
            report = convert(options)
            auto_class = families.auto_class(report.auto_class)
            model = auto_class.from_pretrained(target, trust_remote_code=True, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(target) if report.has_tokenizer else None
        return model, tokenizer
