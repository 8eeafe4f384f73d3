"""The story of a conversion: read, build, operate, write, verify."""

import math
import tempfile
import warnings
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import families, hub, surgery, verify
from .card import write_card
from .companions import (
    MULTI_VECTOR,
    PROJECTION,
    left_out,
    pools_first_token,
    sentence_class,
    with_limits,
    write_colbert,
    write_companions,
    write_tokenizer,
)
from .export import check_export, export_onnx
from .options import (
    MAX_SEQUENCE_LENGTH,
    ConversionOptions,
    OptionError,
    SourceError,
    check_type,
    first_line,
    parse_literals,
)
from .report import FILE_NAME, ConversionReport, hashes
from .source import SOURCE_FAULTS, Source
from .target import check_target, staged, writing


# In the names of classes whose head was trained on a task.
TRAINED_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


def convert(options: ConversionOptions, announce: verify.Announce = lambda step: None) -> ConversionReport:
    """Convert a model, write it to `options.model_name`, and prove what was written.

    Args:
        options: what to convert, and how.
        announce: is called with the next step, in a few words; in none where the Hub's client shows its own progress.

    Returns:
        What was done and checked.

    Raises:
        ConversionError: one line that says what to do. Nothing is left behind then, unless it is the push that failed.
    """
    source = Source(options)
    config = lsg_config(source)
    model = build(source, config)
    check_target(options, source)
    if options.export == "onnx":
        check_export(source, config)
    report = plan(source, config)
    if options.dry_run:
        return report
    name = Path(options.model_name).absolute().name
    if options.push_to_hub:
        name = hub.full_name(options.hub_model_id or name, options.hub_token)

    with staged(options) as folder:
        announce("reading the source")
        original, report.new_weights, report.dropped_weights = source.load()
        announce("building the long model")
        assemble(model, source, original)
        if model.can_generate():
            model.generation_config = original.generation_config
        announce("writing")
        with writing(options):
            model.save_pretrained(folder, save_original_format=False)  # which gives ESM's weights old names
            if source.tokenizer is not None:
                write_tokenizer(source.tokenizer, source, folder)
            write_companions(source, folder)
            if source.is_colbert and sentence_class(folder) is None and PROJECTION in report.dropped_weights:
                write_colbert(source, folder)
                report.dropped_weights.remove(PROJECTION)
                report.changed.append(f"{PROJECTION}: the module 1_Dense")
            report.sentence_class = sentence_class(folder)
            report.left_out = left_out(source, folder, ("README.md", FILE_NAME))
        del original, model

        if not options.no_verify:
            report.checks += verify.checks(source, config, folder, announce)
        if options.export == "onnx":
            with writing(options):
                report.checks.append(export_onnx(source, folder, announce))
        if options.run_test:
            report.heads += verify.run_heads(source, folder, announce)
        announce("writing the card")
        report.warnings = list(source.warnings)
        report.source_files = hashes(source.folder, [source.folder / "config.json", *source.files])
        with writing(options):
            write_card(report, source.folder, folder, name)
            report.files = hashes(folder, [path for path in folder.rglob("*") if path.is_file()])
            report.write(folder)
    if options.push_to_hub:
        announce("")  # the Hub's client shows bars of its own
        message = f"Convert {report.source} to {report.positions} tokens"
        target = Path(options.model_name)
        report.pushed_to = hub.push(target, name, private=options.private, token=options.hub_token, message=message)
    return report


def plan(source: Source, config: Any) -> ConversionReport:
    """What a conversion will do, as far as the configuration tells. Raises OptionError where it cannot be done."""
    options, base_class = source.options, source.family.base_class
    length, trained = options.max_sequence_length, source.positions
    tables = len(base_class.position_tables)
    if length > MAX_SEQUENCE_LENGTH and not tables:
        raise OptionError(f"--max_sequence_length: got {length}; give at most {MAX_SEQUENCE_LENGTH}")
    if length > MAX_SEQUENCE_LENGTH:
        width = getattr(config, "embedding_size", config.hidden_size)
        raise OptionError(
            f"--max_sequence_length: got {length}, for which the positions alone would take "
            f"{4 * tables * length * width:,} bytes in float32; give at most {MAX_SEQUENCE_LENGTH}"
        )
    if not config.absolute_positions:
        positions = "positions: relative, as they are"
    elif source.computes_positions:
        positions = f"positions: computed for {length} tokens"
    else:
        hows = {"tile": "cut" if length < trained else "repeated", "interpolate": "stretched"}
        how = hows.get(options.position_init, f"stretched by {length // trained}")
        positions = f"positions: the {trained} trained rows, {how} to {length}"
    if length < trained and config.absolute_positions:
        source.warnings.append(f"the last {trained - length} of the source's {trained} positions are lost")
    repeated = config.absolute_positions and not source.computes_positions and options.position_init == "tile"
    blocks = 2 if config.causal else 3
    window = blocks * config.block_size
    if repeated and 4 * blocks <= trained < min(window, length):
        fitting = 2 ** ((trained // blocks).bit_length() - 1)
        source.warnings.append(
            f"with blocks of {config.block_size} a token sees {window} places, among which the source's {trained} "
            f"positions are repeated: unless you train it, take blocks of {fitting}, by block_size and "
            "sparse_block_size in --model_kwargs"
        )
    if source.tokenizer is None and not options.dry_run:
        source.warnings.append("the source has no tokenizer, so none was written")
    if reads_first_token(source) and (seen := seen_by_first_token(config)) < length:
        source.warnings.append(
            f"no token sees all, so the first one's state, which pooling or a head reads, does not change with what "
            f"stands behind token {seen:,}: for longer texts load it with num_global_tokens=1, or convert with larger "
            "blocks"
        )
    kept = "kept" if options.resize_lsg else "rebuilt but for the first" if options.keep_first_global_token else "built"
    name = options.initial_model
    return ConversionReport(
        options=options,
        source=name if source.revision else source.folder.resolve().name,
        revision=source.revision,
        model_type=source.family.model_type,
        architecture=source.lsg_class.__name__,
        auto_class=source.family.auto_class(source.lsg_class),
        lsg={field: getattr(config, field) for field in source.family.lsg_fields},
        source_positions=trained,
        positions=length,
        absolute_positions=config.absolute_positions,
        changed=[positions, f"global tokens: 512 rows {kept}, {config.num_global_tokens} used"]
        + (["the decoder: left out"] if source.drops_decoder else [])
        + (["attention: causal (is_decoder)"] if config.causal else [])
        + ([f"dtype: {options.dtype}"] if options.dtype != "auto" else []),
        has_tokenizer=source.tokenizer is not None,
        warnings=list(source.warnings),
        advice=advice(source, config),
    )


def reads_first_token(source: Source) -> bool:
    """Whether a text stands for the state of its first token: by pooling, a head, or for want of either."""
    name = source.lsg_class.__name__
    if source.is_decoder or source.config.is_encoder_decoder or "MaskedLM" in name or "TokenClassification" in name:
        return False
    return pools_first_token(source.folder)


def seen_by_first_token(config: Any) -> float:
    """On how many tokens of a long text the first one's state depends, through all layers."""
    layout, last = config.layout, 0
    if layout.num_global_tokens:
        return math.inf
    for _ in range(config.num_hidden_layers):
        # A query sees to the end of the next block, and as far as the sparse keys behind it stand for.
        last = (last // layout.block_size + 2) * layout.block_size - 1
        last += layout.sparse_block_size * layout.sparsity_factor
    return last + 1


def advice(source: Source, config: Any) -> list[str]:
    """What suits a decoder, and a model that is likely used without training it again: one for sentences, or with a
    trained head."""
    if config.causal and config.pool_with_global and config.num_global_tokens:
        return [
            "pool_with_global puts the state of a global token in the place of the first token's, from which a decoder "
            "says what comes second; --model_kwargs \"{'pool_with_global': False}\" keeps the token's own"
        ]
    g, result = config.num_global_tokens, []
    if g > 2 and not (config.absolute_positions or source.options.random_global_init or source.options.resize_lsg):
        result.append(
            "without positions the global tokens behind the first start alike, and train alike; --random_global_init "
            "tells them apart"
        )
    trained_head = source.has_own_head and any(part in source.lsg_class.__name__ for part in TRAINED_HEADS)
    if source.options.exact or source.is_lsg or not (trained_head or sentence_class(source.folder)):
        return result
    kept = source.positions
    result.append(
        f"--exact gives for texts up to {kept} tokens what the source gives, if you do not train the model again"
    )
    if g > 1:
        result.append(f"{g} global tokens that nothing has trained change much of what it gives; take 1, or none")
    return result


def position_step(source: Source) -> int:
    """`position_step` of the converted model. Raises OptionError where its positions cannot be what is asked for."""
    options, length, trained = source.options, source.options.max_sequence_length, source.positions
    before, got = getattr(source.config, "position_step", 1), f"--position_init: got {options.position_init!r}"
    if source.computes_positions and options.position_init != "tile":
        has = "computes its" if source.family.config_class.absolute_positions else "has relative"
        raise OptionError(f"{got}; {source.family.model_type} {has} positions: leave it out")
    if options.position_init != "stretch":
        if before > 1:
            raise OptionError(f"{got}; the positions of the source are stretched already: give stretch")
        return 1
    if source.is_decoder:
        raise OptionError(
            f"{got} for a decoder, where the place of a token must not depend on those behind it; give tile or "
            "interpolate"
        )
    if length % trained:
        more = -(-length // trained) * trained
        raise OptionError(
            f"--max_sequence_length: got {length}; with --position_init stretch give a multiple of the source's "
            f"{trained} positions, such as {more}"
        )
    return before * (length // trained)


def lsg_config(source: Source) -> Any:
    """The configuration of the converted model. Raises OptionError where a field is not allowed."""
    options, base_class = source.options, source.family.base_class
    kwargs = parse_literals(options.model_kwargs)
    known, hints = source.family.lsg_fields, get_type_hints(source.family.config_class.__bases__[0])
    for name, value in kwargs.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"--model_kwargs: got an unknown field {name!r}; {hint}")
        check_type(f"model_kwargs: {name}", value, hints[name])
    if "position_step" in kwargs:
        raise OptionError("--model_kwargs: got position_step; --position_init stretch sets it")
    kwargs["position_step"] = position_step(source)
    if options.exact and source.family.config_class.has_causal_form and source.is_decoder:
        raise OptionError(
            f"--exact: got it for a decoder, where what a token sees must not depend on those behind it; give "
            f"--model_kwargs \"{{'num_global_tokens': 0, 'block_size': {-(-source.positions // 2)}}}\", where two "
            "blocks have full attention"
        )
    if options.exact:
        kwargs |= {"num_global_tokens": 0, "full_attention_length": source.positions}
    length = options.max_sequence_length
    positions = length + base_class.counted_positions(source.config)
    # Pegasus repeats its positions in `task_specific_params`.
    content = with_limits(source.config.to_dict(), positions, ("max_position_embeddings", "n_positions"))
    changes = {
        **kwargs,
        **source.family.config_class.settle(source.config),
        "auto_map": dict(source.family.auto_map),  # a copy: saving a model changes it
    }
    if "attention_kernel" not in kwargs and (source.is_colbert or sentence_class(source.folder) == MULTI_VECTOR):
        changes["attention_kernel"] = "portable"
        source.warnings.append(
            "attention_kernel is 'portable': queries of a ColBERT use the states of padding, which others leave out"
        )
    try:
        return source.family.config_class.from_dict({**with_limits(content, length), **changes})
    except StrictDataclassError as error:
        message = first_line(error.__cause__ or error)
        if source.is_lsg or any(name in message for name in known):
            raise OptionError(f"--model_kwargs: {message}") from error
        raise SourceError(f"--initial_model: config.json of {options.initial_model!r}: {message}") from error


def long_tables(source: Source, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tables that a conversion changes, by name, made from those of `model`, the loaded source."""
    options, base_class, state = source.options, source.family.base_class, source.tables(model)
    special, length = source.special_positions, options.max_sequence_length
    names = [name for table in base_class.position_tables if (name := source.prefix + table) in state]
    if source.family.config_class.sinusoidal_positions:
        written = [name for name in names if name in model.state_dict()]
        tables = {name: surgery.sinusoidal_positions(length, state[name]) for name in written}
    else:
        lengthen = surgery.stretched_positions if options.position_init == "interpolate" else surgery.longer_positions
        tables = {name: lengthen(state[name], length, special) for name in names}
        if options.position_init == "stretch":  # Not a decoder's: how long its text will be is not known.
            tables[names[0]] = surgery.stepped_positions(state[names[0]], length // source.positions, special)
    global_name = source.prefix + base_class.global_table
    if (positions := source.global_positions(model)) is not None and not options.resize_lsg:
        table = surgery.global_embeddings(
            positions,
            source.global_words(model),
            source.token_type(state),
            options.global_positional_stride,
        )
        if options.keep_first_global_token:
            table = torch.cat([state[global_name][:1], table[1:]])
        tables[global_name] = table
    return tables


def build(source: Source, config: Any) -> PreTrainedModel:
    """The LSG model without weights. Raises SourceError where it cannot be built from the configuration."""
    try:
        with torch.device("meta"):
            return source.lsg_class(config)
    except SOURCE_FAULTS as error:
        raise SourceError(
            f"--initial_model: config.json of {source.options.initial_model!r}: {first_line(error)}; correct it"
        ) from error


def assemble(model: PreTrainedModel, source: Source, original: PreTrainedModel) -> None:
    """Give the model its changed tables and, shared, all other weights of `original`. Raises OptionError."""
    state = {**original.state_dict(), **long_tables(source, original)}
    if absent := sorted(model.state_dict().keys() - state.keys()):
        raise OptionError(
            f"--architecture: {type(original).__name__} of Transformers {transformers.__version__} lacks the weight "
            f"{absent[0]}, which {type(model).__name__} reads; use a newer Transformers"
        )
    model.load_state_dict(state, assign=True)
    # As in the source: weights that its configuration ties, but whose values in its files differ, stay apart.
    model.all_tied_weights_keys = dict(original.all_tied_weights_keys)
    model.tie_weights(recompute_mapping=False)
    # So that saving the model writes its code beside its weights.
    model.register_for_auto_class(source.family.auto_class(source.lsg_class))


class LSGConverter:
    """Converts models to read up to `max_sequence_length` tokens.

    Attributes:
        report: what the last conversion did.
    """

    report: ConversionReport

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
            loads without this package. Modules of sentence-transformers, the licence and the card are not part of it:
            `convert` writes them too.

        Warns:
            UserWarning: for each of the report's warnings, weights that are new or left out, and modules of
                sentence-transformers.

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
            report = self.report = convert(options)
            lines = [f"new weights, untrained: {', '.join(report.new_weights)}"] if report.new_weights else []
            if report.dropped_weights:
                lines.append(f"weights of the source that were left out: {', '.join(report.dropped_weights)}")
            if report.sentence_class:
                lines.append(
                    "the source's modules of sentence-transformers are not part of what is returned; "
                    f"lsg_converter.convert writes a folder with them, which {report.sentence_class} loads"
                )
            for line in (*report.warnings, *lines):
                warnings.warn(f"{initial_model}: {line}", stacklevel=2)
            auto_class = families.auto_class(report.auto_class)
            model = auto_class.from_pretrained(target, trust_remote_code=True, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(target) if report.has_tokenizer else None
        return model, tokenizer
