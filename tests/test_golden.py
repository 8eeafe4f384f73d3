"""The recorded numbers of the reference, through the command and `AutoModel`."""

import json

import pytest
import torch
import transformers
from conftest import run_command
from safetensors.torch import load_file

from lsg_converter import families


@torch.no_grad()
def test_cases(golden, converted):
    assert len(golden.cases) >= 20
    for name, case in golden.cases.items():
        model = transformers.AutoModel.from_pretrained(
            converted, trust_remote_code=True, attn_implementation="eager", **case["config"]
        ).eval()
        check_case(golden, name, model)
        model.set_attn_implementation("sdpa")
        check_case(golden, name, model)


def check_case(golden, name, model):
    inputs, outputs = (golden.tensors(f"case.{name}.{part}.") for part in ("in", "out"))
    actual = model(**inputs)
    for field, expected in outputs.items():
        if field == "logits":
            continue  # of the model with its head, below
        result, real = actual[field], inputs["attention_mask"].bool()
        if field == "encoder_last_hidden_state" and expected.shape[1] > result.shape[1]:
            # Recorded with the global tokens that it passes on in front.
            passed = expected.shape[1] - real.shape[1]
            global_states = model.get_encoder()(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
            torch.testing.assert_close(
                global_states.global_hidden_state, expected[:, :passed], rtol=0, atol=2e-4, msg=name
            )
            expected = expected[:, passed:]
        if field.endswith("last_hidden_state") and result.shape[1] == real.shape[1]:
            assert result.shape == expected.shape
            result, expected = result[real], expected[real]
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-4, msg=f"{name}: {field}")


@pytest.mark.few_families
def test_logits(golden, converted):
    """Of the model with its head, where they were recorded."""
    content = json.loads((converted / "config.json").read_text())
    family = families.family(content["model_type"])
    auto_class = families.auto_class(family.auto_class(family.lsg_class(content["architectures"][0])))
    for name, case in golden.cases.items():
        expected = golden.expected.get(f"case.{name}.out.logits")
        if expected is None:
            continue
        model = auto_class.from_pretrained(converted, trust_remote_code=True, **case["config"]).eval()
        with torch.no_grad():
            actual = model(**golden.tensors(f"case.{name}.in.")).logits
        if actual.shape == (real := golden.expected[f"case.{name}.in.input_ids"]).shape + actual.shape[2:]:
            hidden = ~golden.expected[f"case.{name}.in.attention_mask"].bool()
            actual = actual.masked_fill(hidden.view(*real.shape, *[1] * (actual.dim() - 2)), 0)
        if actual.shape != expected.shape:
            actual = actual[:, :: case["logits_stride"]]
        keep = actual.ne(0)
        torch.testing.assert_close(actual[keep], expected[keep], rtol=0, atol=2e-4, msg=name)


@pytest.mark.few_families
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
