"""The recorded numbers of the reference, through the command and `AutoModel`."""

import json

import pytest
import torch
import transformers
from conftest import run_command
from safetensors.torch import load_file


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_cases(golden, converted, kernel):
    assert len(golden.cases) >= 24
    for name, case in golden.cases.items():
        inputs, outputs = (golden.tensors(f"case.{name}.{part}.") for part in ("in", "out"))
        model = transformers.AutoModel.from_pretrained(
            converted, trust_remote_code=True, attn_implementation=kernel, **case["config"]
        ).eval()
        with torch.no_grad():
            actual = model(**inputs)
        for field, expected in outputs.items():
            result = actual[field]
            if field == "last_hidden_state":
                real = inputs["attention_mask"].bool()
                result, expected = result[real], expected[real]
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-4, msg=f"{name}: {field}")


def test_conversions(golden, tmp_path):
    """The tables that a conversion writes, to the bit."""
    assert golden.conversions
    for name, conversion in golden.conversions.items():
        flags = ["--max_sequence_length", "1000"]
        for flag, value in conversion["args"].items():
            flags += [f"--{flag}", str(value)]
        assert run_command(golden.source, tmp_path / name, *flags) == 0
        written = load_file(tmp_path / name / "model.safetensors")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["max_position_embeddings"] == conversion["config_max_position_embeddings"]
        for key, shape in conversion["keys"].items():
            table, expected = written[key], golden.expected[f"conversion.{name}.{key}"]
            assert list(table.shape) == shape
            if len(expected) != len(table):
                table = table[:24] if "global" in key else table[-24:]
            assert torch.equal(table, expected), (name, key)
