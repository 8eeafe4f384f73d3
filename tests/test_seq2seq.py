"""Encoder-decoder families: what passes from the encoder to the decoder, and generation."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from lsg_converter import families
from lsg_converter.families import stock_class


RELATIVE = ["t5", "mt5", "umt5"]  # without positions
FAMILIES = ["bart", "mbart", "pegasus", "blenderbot", "blenderbot_small", "m2m_100", "marian", "plbart", *RELATIVE]
pytestmark = pytest.mark.made_families
SMALL = {"block_size": 4, "sparse_block_size": 4, "num_global_tokens": 2}


@pytest.fixture
def load(converted):
    def load(**kwargs):
        return AutoModelForSeq2SeqLM.from_pretrained(converted, trust_remote_code=True, **{**SMALL, **kwargs}).eval()

    return load


def batch(model, tokens, real):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, real:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("passed", [True, False])
def test_the_decoder_sees_the_global_tokens_that_are_passed_on(load, passed):
    model = load(pass_global_tokens_to_decoder=passed)
    inputs = batch(model, 30, 19)
    decoder_ids = inputs["input_ids"][:, :5]
    outputs = model(**inputs, decoder_input_ids=decoder_ids, output_hidden_states=True)
    assert outputs.encoder_last_hidden_state.shape[1] == 30  # as the mask is
    assert {state.shape[1] for state in outputs.encoder_hidden_states} == {30}
    assert len(outputs.encoder_hidden_states) == model.config.num_hidden_layers + 1
    as_tuple = model(**inputs, decoder_input_ids=decoder_ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)
    # In two steps, as generation does it.
    encoded = model.get_encoder()(**inputs)
    assert encoded.last_hidden_state.shape[1] == 30
    for name, states in encoded.items():
        encoded[name] = states.detach().requires_grad_()
    two_steps = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": decoder_ids}
    again = model(encoder_outputs=encoded, **two_steps)
    assert torch.equal(again.logits, outputs.logits)
    # Global tokens reach the decoder's cross-attention, or only the text does.
    again.logits[:, -1].square().sum().backward()
    seen = encoded.last_hidden_state.grad.abs().sum(-1) > 0
    assert torch.equal(seen, inputs["attention_mask"].bool())
    assert ("global_hidden_state" in encoded) is passed
    assert not passed or encoded.global_hidden_state.grad.abs().sum(-1).gt(0).all()
    as_tuple = model.get_encoder()(**inputs, return_dict=False)
    assert torch.equal(model(encoder_outputs=as_tuple, **two_steps).logits, outputs.logits)
    # States alone are what the decoder then sees.
    alone = model(encoder_outputs=(encoded.last_hidden_state,), **two_steps)
    assert torch.equal(alone.logits, outputs.logits) is not passed


def test_attentions(load):
    model = load(attn_implementation="eager")
    inputs = batch(model, 30, 30)
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    outputs = model(**inputs, output_attentions=True)
    heads = model.config.num_attention_heads
    assert {a.shape for a in outputs.encoder_attentions} == {(2, heads, 30, 2 + 12 + 8)}
    base = getattr(model, model.base_model_prefix, model)
    outputs_of_base = base(**inputs, output_attentions=True)
    assert {a.shape for a in outputs_of_base.encoder_global_attentions} == {(2, heads, 2, 32)}
    assert {a.shape for a in outputs.cross_attentions} == {(2, heads, 5, 32)}
    assert {a.shape for a in outputs.decoder_attentions} == {(2, heads, 5, 5)}


def test_padding_on_the_right_changes_no_logits(load, golden):
    model = load(dtype=torch.float64)
    for real in (1, 8, 9, 21):
        inputs = batch(model, 61, real)
        decoder_ids = inputs["input_ids"][:, :5]
        padded = model(**inputs, decoder_input_ids=decoder_ids).logits[:1]
        alone = model(input_ids=inputs["input_ids"][:1, :real], decoder_input_ids=decoder_ids[:1]).logits
        # The decoder of older T5 has its softmax in float32.
        atol = 1e-5 if golden.name in RELATIVE and not stock_class(type(model))._supports_sdpa else 1e-10
        torch.testing.assert_close(padded, alone, rtol=0, atol=atol)


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 1, "do_sample": False},
        {"num_beams": 3},
        {"do_sample": True, "num_beams": 1},
        {"num_beams": 1, "cache_implementation": "static"},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=str,
)  # fmt: skip
def test_generate(load, how, passed):
    """On the longest input: with a cache, and without, and with the rows one by one, it writes the same."""
    model = load(pass_global_tokens_to_decoder=passed, dtype=torch.float64)
    inputs = batch(model, 1000, 700)
    options = {**how, "max_new_tokens": 8, "min_new_tokens": 8}
    results = []
    for cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **options, use_cache=cache))
    assert torch.equal(*results)
    assert results[0].shape[0] == 2 * how.get("num_return_sequences", 1) and results[0].shape[1] >= 9
    if not how.get("do_sample"):
        alone = model.generate(inputs["input_ids"][:1, :700], **options)
        assert torch.equal(results[0][: len(alone)], alone)


def test_generation_config_travels_along(golden, converted):
    source, written = (json.loads((f / "generation_config.json").read_text()) for f in (golden.source, converted))
    source.pop("transformers_version"), written.pop("transformers_version")
    assert {key: written[key] for key in source} == source


def test_both_position_tables_grow_and_computed_ones_are_computed(golden, converted):
    source, written = (load_file(folder / "model.safetensors") for folder in (golden.source, converted))
    for part in ("encoder", "decoder"):
        old, new = (weights.get(f"model.{part}.embed_positions.weight") for weights in (source, written))
        if golden.name in ("m2m_100", *RELATIVE):
            assert old is None and new is None  # M2M100 computes them for each text
        elif golden.name == "marian":
            assert old is None and torch.equal(new, MarianSinusoidalPositionalEmbedding(1000, 16).create_weight())
        elif golden.name == "pegasus":
            torch.testing.assert_close(new[:512], old, rtol=0, atol=1e-6)
            assert not torch.equal(new[512:], old[: 1000 - 512])
        else:
            first = len(old) - 512
            assert len(new) == 1000 + first
            assert torch.equal(new[: len(old)], old) and torch.equal(new[len(old) :], old[first : first + 488])


def test_gradient_checkpointing_reaches_encoder_and_decoder(load, golden):
    model = load()
    model.gradient_checkpointing_enable()
    layers = [
        name
        for name, m in model.named_modules()
        if getattr(m, "gradient_checkpointing", False) and re.search(r"(layers|block)\.\d+$", name)
    ]
    config = model.config
    decoder_layers = config.num_decoder_layers if golden.name in RELATIVE else config.decoder_layers
    assert len(layers) == config.num_hidden_layers + decoder_layers
    inputs = batch(model.train(), 30, 30)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_layerdrop(load):
    model = load(encoder_layerdrop=1.0).train()
    inputs = batch(model, 30, 30)
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_computed_positions_are_not_trained(load, golden):
    model = load().train()
    inputs = batch(model, 30, 30)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    parts = ("encoder", "decoder") if golden.name in ("pegasus", "marian") else ()
    assert untrained == {f"model.{part}.embed_positions.weight" for part in parts}


def test_only_a_decoder_has_no_global_tokens(converted, golden):
    auto_class = families.auto_class("AutoModelForCausalLM")
    if golden.name in ("m2m_100", *RELATIVE):
        pytest.skip("it has no such head")
    model = auto_class.from_pretrained(converted, trust_remote_code=True).eval()
    assert not any("global" in name for name, _ in model.named_parameters())
    ids = torch.arange(5, 105)[None].repeat(1, 9)
    assert model(ids).logits.isfinite().all()
    model.save_pretrained(converted.parent / f"causal-{golden.name}")


def test_a_family_that_lies_is_found(golden, tmp_path, capsys):
    """BARThez checkpoints are mBART ones; some of them say that they are BART."""
    import shutil

    from conftest import run_command

    if golden.name != "mbart":
        pytest.skip("for mBART checkpoints")
    source = tmp_path / "barthez"
    shutil.copytree(golden.source, source)
    content = json.loads((source / "config.json").read_text())
    changes = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
    (source / "config.json").write_text(json.dumps({**content, **changes}))
    assert run_command(source, tmp_path / "lsg") == 3
    assert "has weights that BartForConditionalGeneration lacks: model.decoder.layer_norm" in capsys.readouterr().err
    flags = ["--model_type", "mbart", "--architecture", "MBartForConditionalGeneration"]
    assert run_command(source, tmp_path / "lsg", *flags) == 0
    written = json.loads((tmp_path / "lsg" / "config.json").read_text())
    assert written["model_type"] == "mbart" and written["architectures"] == ["LSGMBartForConditionalGeneration"]
