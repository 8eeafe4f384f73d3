"""Graphs: one that is exported, from whatever dummy, is right at every length; `torch.compile` makes few."""

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import Golden, Made, run_command
from test_attention import arguments
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from lsg_converter.modeling.lsg_attention import lsg_attention
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


pytestmark = pytest.mark.newest
HEADS, WIDTH = 2, 8
LENGTHS = (1, 2, 8, 9, 16, 17, 24, 25, 61)  # around the edges of blocks of 8
FAMILIES = ["bert", "roberta", "bart"]
FULL = pytest.mark.full
ONNX = pytest.param("onnx", marks=FULL)
EXPORTERS = ("torch.export", "torch.jit.trace", ONNX, "onnx, dynamo=False")
FASTEST = (pytest.param("torch.export", marks=FULL), *EXPORTERS[1:])


class Attention(torch.nn.Module):
    """The results of several calls, side by side, each with its options; queries, keys and values are in `states`."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, states, mask):
        outputs = []
        for options in self.calls:
            g = options["num_global_tokens"]
            # Global tokens of which it does not matter what they are.
            rows = torch.cat([states[:, :1]] * g + [states], dim=1)
            keep = torch.cat([mask.new_ones(mask.shape[0], g), mask], dim=1)
            tokens = rows.view(*rows.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
            output, _ = lsg_attention(tokens[0], tokens[1], tokens[2], keep, **options)
            outputs.append(output[:, :, g:])
        return torch.stack(outputs)


def calls(kinds, globals_, full=None):
    return [arguments((8, 8, 2), kind, g) | {"full_attention_length": full} for kind in kinds for g in globals_]


def text(length, batch=3):
    """Rows of a batch: one whole, one padded on the right, one masked, and more that are whole."""
    states = torch.randn(batch, length, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(length))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, length // 3 + 1 :] = False
    mask[2] = False
    return states, mask


def export(exporter, model, dummy, folder):
    """Export a model of a text and its mask; returns what runs the graph."""
    names, axes = ["text", "mask"], {0: "batch", 1: "length"}
    if exporter == "torch.export":
        shapes = dict.fromkeys(axes, Dim.DYNAMIC)
        return torch.export.export(model, dummy, dynamic_shapes=(shapes, shapes)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of what is deprecated
        if exporter == "torch.jit.trace":
            return torch.jit.trace(model, dummy, check_trace=False)
        dynamo, path = exporter == "onnx", folder / "model.onnx"
        torch.onnx.export(
            model, dummy, path, dynamo=dynamo, input_names=names, dynamic_axes=dict.fromkeys(names, axes), verbose=False
        )
    import onnxruntime  # which the oldest environment may lack

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *inputs: torch.tensor(
        session.run(None, {k: x.numpy() for k, x in zip(names, inputs, strict=True)})[0]
    )


def check(exporter, attention, dummy, folder):
    graph = export(exporter, attention, text(dummy), folder)
    for length in LENGTHS:
        states, mask = text(length, batch=4)
        weight = mask[:, None, :, None]
        actual, expected = graph(states, mask) * weight, attention(states, mask) * weight
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=lambda text, at=length: f"{at}: {text}")


@pytest.mark.parametrize("dummy", [2, pytest.param(8, marks=FULL), 16, pytest.param(24, marks=FULL), 30])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_dummy_is_right_at_every_length(exporter, dummy, tmp_path):
    check(exporter, Attention(calls(["norm"], [1])), dummy, tmp_path)


@pytest.mark.parametrize("exporter", ["torch.jit.trace", ONNX, "onnx, dynamo=False"])
def test_a_dummy_of_one_token_is_right_or_refused(exporter, tmp_path):
    attention = Attention(calls(["norm"], [1]))
    check(exporter, attention, 1, tmp_path)
    with pytest.raises(ValueError, match="specialized due to hint of 1"):  # as for any model
        export("torch.export", attention, text(1), tmp_path)


@pytest.mark.parametrize("exporter", FASTEST)
def test_every_sparsifier_is_exported(exporter, tmp_path):
    # To ONNX these three need all that the others do.
    kinds = ["norm", "bos_pooling", "lsh"] if exporter == "onnx" else SPARSITY_TYPES
    check(exporter, Attention(calls(kinds, [1])), 16, tmp_path)


@pytest.mark.parametrize("exporter", FASTEST)
def test_global_tokens_and_full_attention_are_exported(exporter, tmp_path):
    check(exporter, Attention(calls(["norm"], [0, 3]) + calls(["norm"], [0, 3], full=28)), 3, tmp_path)


@pytest.mark.full
def test_a_length_may_have_a_name_where_scores_have_a_bias():
    """Also beside a batch of one size. torch then looks at how keys and values lie in memory."""
    bias = torch.nn.Parameter(torch.randn(HEADS, 21, generator=torch.Generator().manual_seed(0)))
    attention = Attention([options | {"bias": bias} for options in calls(["none"], [1])])
    attention.register_parameter("bias", bias)
    axes = {1: Dim("length", max=200)}
    graph = torch.export.export(attention, text(61), dynamic_shapes=(axes, axes)).module()
    for length in LENGTHS[2:]:
        states, mask = text(length)
        actual, expected = (run(states, mask) * mask[:, None, :, None] for run in (graph, attention))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class FirstOutput(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


@pytest.fixture
def model(converted, request):
    """Of one layer, which has all that a graph may get wrong."""
    fields = {"block_size": 8, "sparse_block_size": 8, "position_step": getattr(request, "param", 1)}
    fields["num_hidden_layers"] = 1
    if converted.parent.name.startswith("bart"):
        fields["decoder_layers"] = 1
    return FirstOutput(AutoModel.from_pretrained(converted, trust_remote_code=True, **fields)).eval()


def ids(length, batch=2):
    tokens = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    mask[1, length // 2 + 1 :] = 0
    mask[2:, : length // 2] = 0  # from whose first token on RoBERTa counts its blocks
    return tokens.masked_fill(mask == 0, 1), mask  # the padding of BART and RoBERTa


@pytest.mark.few_families
@pytest.mark.parametrize("model", [1, pytest.param(40, marks=FULL)], indirect=True, ids=["", "stretched"])
@pytest.mark.parametrize("exporter", ["torch.export", "onnx, dynamo=False"])
def test_models_are_exported(model, exporter, tmp_path):
    graph = export(exporter, model, ids(16), tmp_path)
    with torch.no_grad():
        for length in (3, *LENGTHS[2:]):  # BART's decoder reads 3 tokens or more
            tokens, mask = ids(length, batch=3)
            actual, expected = (run(tokens, mask) * mask[..., None] for run in (graph, model))
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


@pytest.mark.few_families("bert")
def test_a_length_may_have_a_name(model, golden):
    if golden.name == "bart":
        pytest.skip("its decoder has a condition on the length, as the stock one's")
    axes = {0: Dim("batch"), 1: Dim("length", max=1000)}  # which torch refuses where a graph has other conditions
    torch.export.export(model, ids(16), dynamic_shapes=(axes, axes))


def test_what_a_graph_cannot_have_is_refused(model):
    tokens, mask = ids(30)
    with pytest.raises(ValueError, match=r"global_attention_mask: got one while exporting"):
        torch.jit.trace(lambda tokens, mask: model.model(tokens, mask, global_attention_mask=mask)[0], (tokens, mask))


@pytest.mark.few_families("bert")
@pytest.mark.parametrize(
    ("model", "dynamic", "graphs"),
    [(1, True, 2), *(pytest.param(*case, marks=FULL) for case in ((1, None, 3), (40, True, 2)))],
    indirect=["model"],
)
def test_compiling_makes_a_graph_for_short_texts_and_one_for_long_ones(model, dynamic, graphs):
    counter = CompileCounter()
    compiled = torch.compile(model, dynamic=dynamic, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in (5, 61, 15, 16, 17, 18, 24, 32, 100):
            tokens, mask = ids(length)
            actual, expected = compiled(tokens, mask) * mask[..., None], model(tokens, mask) * mask[..., None]
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)
        assert counter.frame_count == graphs
        for batch in (3, 4, 7):
            compiled(*ids(40, batch))
    graphs += dynamic is None  # that one for batches of any size
    assert counter.frame_count == graphs
    if dynamic:
        model.train()
        for length in (5, 61, 15, 17, 32, 100):
            compiled(*ids(length)).sum().backward()
        assert counter.frame_count == 2 * graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("roberta", ["--position_init", "stretch"]),
        pytest.param("roberta", ["--exact"], marks=FULL),
        pytest.param("bert", [], marks=FULL),
        pytest.param("bert", ["--exact", "--position_init", "stretch"], marks=FULL),
    ],
    ids=str,
)
def test_the_command_writes_a_graph(name, tmp_path, flags, monkeypatch, capsys):
    source, target = tmp_path / "source", tmp_path / "lsg"
    shutil.copytree(Golden(name).source, source)
    AutoModelForMaskedLM.from_pretrained(source, num_hidden_layers=1).save_pretrained(source)
    flags = [*flags, "--max_sequence_length", "1024", "--model_kwargs", "{'block_size': 32, 'sparse_block_size': 32}"]
    assert run_command(source, target, "--export", "onnx", *flags) == 0
    report = json.loads((target / "lsg_conversion.json").read_text())
    assert any("onnx/model.onnx gives what the model gives, from 1 to 1024" in x["name"] for x in report["checks"])
    assert "onnx/model.onnx" in report["files"]
    session = onnxruntime.InferenceSession(target / "onnx" / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert [x.name for x in session.get_inputs()] == tokenizer.model_input_names
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True).eval()
    texts = tokenizer(["a text " * 200, "another"], padding=True, return_tensors="pt")
    logits = session.run(["logits"], {name: value.numpy() for name, value in texts.items()})[0]
    with torch.no_grad():
        expected = model(**texts).logits
    mask = texts["attention_mask"] > 0
    torch.testing.assert_close(torch.from_numpy(logits)[mask], expected[mask], rtol=0, atol=1e-4)
    script = Path(__file__).parents[1] / "experiments" / "efficiency" / "onnx_graph.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(target), "--lengths", "5", "300", "--rounds", "1"])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.full
def test_an_encoder_decoder_has_a_graph_of_its_encoder(tmp_path):
    target = tmp_path / "lsg"
    flags = ["--max_sequence_length", "512", "--model_kwargs", "{'block_size': 32, 'sparse_block_size': 32}"]
    assert run_command(Golden("bart").source, target, "--export", "onnx", "--quiet", "--no_verify", *flags) == 0
    session = onnxruntime.InferenceSession(target / "onnx" / "encoder_model.onnx")
    model = AutoModel.from_pretrained(target, trust_remote_code=True).eval()
    tokens, mask = ids(300)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    names = ["last_hidden_state", "global_hidden_state"]  # which the decoder sees too
    outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = model.encoder(**inputs)
    for name, actual in zip(names, map(torch.from_numpy, outputs), strict=True):
        weight = mask[..., None] if name == names[0] else 1
        torch.testing.assert_close(actual * weight, expected[name] * weight, rtol=0, atol=1e-4)


def test_what_has_no_graph_is_refused(tmp_path, bert, capsys, monkeypatch):
    target = tmp_path / "lsg"
    for source, head in ((Golden("bart"), "BartForQuestionAnswering"), (bert, "BertForMultipleChoice")):
        assert run_command(source.source, target, "--export", "onnx", "--architecture", head) == 2
        assert "--export: got 'onnx' for LSGB" in capsys.readouterr().err
    assert run_command(Made("layoutlm", tmp_path).source, target, "--export", "onnx") == 2
    assert "which reads bbox beside the ids" in capsys.readouterr().err
    monkeypatch.setattr("lsg_converter.export.PACKAGES", ("onnx", "no_such_package"))
    assert run_command(bert.source, target, "--export", "onnx") == 2
    assert "needs no_such_package; pip install" in capsys.readouterr().err
    assert not target.exists()
