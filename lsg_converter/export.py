"""An ONNX graph beside the weights, held against the model that it was made from."""

import logging
import warnings
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import auto_class
from .options import OptionError
from .source import Source
from .verify import Announce, Check, fitting, random_text, require, tensors_of


# Where Optimum and sentence-transformers look for a graph, and what they call it, or an encoder-decoder's encoder.
GRAPH, ENCODER_GRAPH = "onnx/model.onnx", "onnx/encoder_model.onnx"
# What a text of some families is made of beside its ids, and a graph would lack.
OTHER_INPUTS = ("bbox", "xpath_tags_seq", "lang_ids")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Of the states as a whole: where two keys have all but the same norm, rounding may choose the other one.
TOLERANCE = 1e-3
LONGEST = 4096  # What a graph is tried on; its memory grows with the text.


class NamedOutputs(nn.Module):
    """A model that takes its inputs by place, and gives its tensors by place."""

    def __init__(self, model: PreTrainedModel, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(tensors_of(outputs).values())


def check_export(source: Source, config: Any) -> None:
    """Raise OptionError where no graph can be made."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"--export: got 'onnx', which needs {', '.join(missing)}; pip install \"lsg-converter[onnx]\", or leave it "
            "out"
        )
    name = source.lsg_class.__name__
    parameters = signature(source.family.base_class.forward).parameters
    others = [other for other in OTHER_INPUTS if other in parameters]
    if others:
        raise OptionError(
            f"--export: got 'onnx' for {name}, which reads {others[0]} beside the ids, as a graph would not; leave it "
            "out"
        )
    kind = None
    if name.endswith("MultipleChoice"):
        kind = "chooses among texts"
    elif config.causal:
        kind = "writes text"
    elif config.is_encoder_decoder and not name.endswith(("Model", "ForConditionalGeneration")):
        kind = "reads with its decoder too"
    if kind is not None:
        raise OptionError(
            f"--export: got 'onnx' for {name}, which {kind}; a graph is made of encoders that read one text: leave it "
            "out"
        )


def export_onnx(source: Source, folder: Path, announce: Announce) -> Check:
    """Write the graph of the checkpoint in `folder`, in float32, of batches and texts of any size. An encoder-decoder's
    is that of its encoder alone.

    Its inputs are those of the tokenizer, its outputs the model's tensors by their names.

    Raises:
        VerificationError: where the graph gives other states than the model.
    """
    announce("exporting")
    cls = auto_class(source.family.auto_class(source.lsg_class))
    model = cls.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    graph = GRAPH
    if model.config.is_encoder_decoder:
        model, graph = model.get_encoder(), ENCODER_GRAPH
    known = ("input_ids", "attention_mask", "token_type_ids")
    given = getattr(source.tokenizer, "model_input_names", known[:2])
    inputs = [name for name in known if name in given]
    named = NamedOutputs(model, inputs).eval()
    # A size of one would be taken for a constant.
    tensors = batch(model, inputs, 2, min(16, source.options.max_sequence_length))
    with torch.no_grad():
        outputs = list(tensors_of(model(**tensors)))
    axes = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs)
    path = folder / graph
    path.parent.mkdir()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is missing, it says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of log(0), for a bucket of T5's that is not taken
        torch.onnx.export(
            named,
            tuple(tensors.values()),
            path,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes={"tensors": axes},
            dynamo=True,
            verbose=False,
        )
    return same_as_model(folder, graph, model, inputs, source.options.max_sequence_length, announce)


def batch(model: PreTrainedModel, inputs: list[str], rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Texts of which each is shorter than the one before, padded on the right."""
    ids = random_text(model, rows, tokens)
    mask = torch.arange(tokens) < torch.tensor([[max(tokens - 3 * row, 1)] for row in range(rows)])
    if model.config.pad_token_id is not None:
        ids = ids.masked_fill(~mask, model.config.pad_token_id)
    every = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(ids)}
    return {name: every[name] for name in inputs}


@torch.no_grad()
def same_as_model(
    folder: Path, graph: str, model: PreTrainedModel, inputs: list[str], limit: int, announce: Announce
) -> Check:
    """The graph gives what the model gives, one text or three padded ones, around the edges of blocks."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
    block, full = model.config.block_size, model.config.full_attention_length or 0
    edges = {1, block, block + 1, 2 * block, 2 * block + 1, full, full + 1, 5 * block + 3, LONGEST, limit}
    lengths = sorted({fitting(model, tokens) for tokens in edges if 0 < tokens <= min(limit, LONGEST)})
    worst = 0.0
    for tokens in lengths:
        announce(f"reading {tokens} tokens with the graph")
        for rows in (1, 3):
            texts = batch(model, inputs, rows, tokens)
            expected = tensors_of(model(**texts)).values()
            actual = session.run(None, {name: value.numpy() for name, value in texts.items()})
            mask = texts["attention_mask"] > 0
            for a, b in zip(map(torch.from_numpy, actual), expected, strict=True):
                if b.shape[:2] == mask.shape:  # a state for each token, of which those of padding mean nothing
                    a, b = a[mask], b[mask]
                worst = max(worst, float((a - b).norm() / b.norm()))
    hint = ""
    if model.config.sparsity_type == "norm":  # as where positions are rotary, and words alike have norms alike
        hint = "; where many keys have one norm, rounding chooses among them: try sparsity_type 'pooling'"
    require(worst <= TOLERANCE, f"{graph} gives states {worst:.0e} away from the model's{hint}")
    return Check(
        f"{graph} gives what the model gives, from {lengths[0]} to {lengths[-1]} tokens", f"{worst:.0e}, float32"
    )
