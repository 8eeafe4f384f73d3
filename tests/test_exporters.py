"""The exporters of Transformers: a graph of a converted checkpoint, made as a user would, is right at every length."""

import pytest
import torch
from test_export import LENGTHS, ids
from transformers import AutoModel


pytestmark = pytest.mark.newest  # which has them
FAMILIES = ["bert", "bart"]


@pytest.mark.parametrize("name", ["Dynamo", *(pytest.param(x, marks=pytest.mark.full) for x in ("Onnx", "OpenVINO"))])
def test_a_graph_is_right_at_every_length(converted, golden, name):
    if name == "OpenVINO":
        pytest.importorskip("openvino")
    exporters = pytest.importorskip("transformers.exporters")
    exporter, config = (getattr(exporters, f"{name}{kind}") for kind in ("Exporter", "Config"))
    fields = {"block_size": 8, "sparse_block_size": 8}
    model = AutoModel.from_pretrained(converted, trust_remote_code=True, **fields).eval()
    names = ("input_ids", "attention_mask")
    graph = exporter().export(model, dict(zip(names, ids(16), strict=True)), config=config(dynamic=True))
    if name == "OpenVINO":
        graph.to("cpu", config={"INFERENCE_PRECISION_HINT": "f32"})  # Some CPUs have a default of bfloat16.
    # The stock decoder of BART has a guard against fewer tokens.
    for length in [x for x in (*LENGTHS, 1000) if x > 2 or not (golden.name == "bart" and name == "Dynamo")]:
        for rows in (1, 3):
            inputs = dict(zip(names, (x[:rows] for x in ids(length, 3)), strict=True))
            mask = inputs["attention_mask"][..., None]
            with torch.no_grad():
                actual, expected = (run(**inputs).last_hidden_state * mask for run in (graph, model))
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)
