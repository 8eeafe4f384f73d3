"""LSG attention by its name in models of Transformers that are not converted."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import GOLDEN, run_command
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    StaticCache,
)

from lsg_converter import register_attention
from lsg_converter.modeling.lsg_forward import is_cross_attention, lsg_forward, sliding_attention


SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40},
    **{"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3},
    **{"cls_token_id": 1, "sep_token_id": 2},
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ENCODERS = {
    "ModernBert": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "EuroBert": GROUPED,
    "NomicBert": {},
    "Gte": {},
    "Esm": {"position_embedding_type": "rotary"},
    "XLMRobertaXL": {},
    "LayoutLM": {},  # whose modules do not say that they are not causal
}
DECODERS = {
    "GPT2": {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
}
# Positions that are learned count from the start of a batch, unless the model is given others.
NEEDS_POSITIONS = ("GPT2", "Llama", "Qwen3", "LayoutLM")
BLOCKS = {"block_size": 4, "sparse_block_size": 4}


def config(name, **fields):
    family = getattr(transformers, f"{name}Config", None)
    if family is None:
        pytest.skip(f"this Transformers has no {name}")
    return family(**{**SIZES, **{**ENCODERS, **DECODERS}.get(name, {}), **fields})


def model(name, attention="lsg", auto=AutoModel, **fields):
    torch.manual_seed(0)
    return auto.from_config(config(name, **fields), attn_implementation=attention).double().eval()


# Before 5.23 LayoutLM computed its attention itself.
NAMES = [pytest.param(x, marks=pytest.mark.newest) if x == "LayoutLM" else x for x in (*ENCODERS, *DECODERS)]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """What a test registers is gone after it."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    register_attention("lsg", **BLOCKS)
    register_attention("lsg-plain", **BLOCKS, attention_kernel="eager")
    register_attention("lsg-long", block_size=32)


def batch(length=50):
    """Texts of their own lengths, padded: on the right, on the left, and on both sides."""
    ids = torch.randint(5, 60, (4, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = mask[2, : length // 3] = mask[3, :5] = mask[3, -3:] = 0
    return ids * mask, mask


def inputs(name, ids, mask):
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name in NEEDS_POSITIONS else {}
    return {"input_ids": ids, "attention_mask": mask, **positions}


def states(model, name, ids, mask):
    return model(**inputs(name, ids, mask)).last_hidden_state


def outputs_and_grads(model, name, attention):
    model.set_attn_implementation(attention)
    model.zero_grad()
    ids, mask = batch()
    output = states(model, name, ids, mask) * mask[..., None]
    output.square().sum().backward()
    return [output.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


@pytest.mark.parametrize(("one", "other"), [("lsg-long", "sdpa"), ("lsg", "lsg-plain")], ids=["short", "long"])
def test_a_model_gives_what_another_attention_gives(name, one, other):
    """With blocks longer than the text ordinary attention; with small ones the plain form of LSG. Gradients too."""
    network = model(name)
    results = [outputs_and_grads(network, name, attention) for attention in (one, other)]
    assert len(results[0]) > 10
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-8)
    if one == "lsg":
        assert not torch.allclose(results[0][0], outputs_and_grads(network, name, "sdpa")[0], atol=1e-3)


def test_padding_never_changes_a_row(name):
    network, (ids, mask) = model(name), batch()
    output = states(network, name, ids, mask)
    for row, kept in enumerate(mask.bool()):
        alone = states(network, name, ids[row : row + 1, kept], mask[row : row + 1, kept])
        torch.testing.assert_close(output[row : row + 1, kept], alone, rtol=0, atol=1e-5)  # of positions in float32


@pytest.mark.parametrize("name", DECODERS)
def test_no_token_looks_ahead(name):
    network, (ids, mask) = model(name), batch()
    mask = torch.ones_like(mask)
    other = torch.cat([ids[:, :31], 64 - ids[:, 31:].clamp(min=5)], dim=1)
    one, two = (states(network, name, x, mask)[:, :31] for x in (ids, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_the_full_pass(name, cache):
    """Texts that begin late and short ones too; step by step, and several tokens at a time."""
    register_attention("lsg", **BLOCKS, num_global_tokens=2)
    network, (ids, mask) = model(name, auto=AutoModelForCausalLM), batch(40)
    mask = torch.ones_like(mask)
    mask[1, :20] = mask[2, :3] = 0
    whole = network(**inputs(name, ids, mask), use_cache=False).logits
    past = None
    if cache == "static":
        past = StaticCache(config=network.config, max_cache_len=48)
    positions = inputs(name, ids, mask)["position_ids"]
    for start, stop in ((0, 21), (21, 22), (22, 23), (23, 34), (34, 35)):
        output = network(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop], use_cache=True,
            past_key_values=past,
        )  # fmt: skip
        past = output.past_key_values
        kept = mask[:, start:stop, None]
        torch.testing.assert_close(output.logits * kept, whole[:, start:stop] * kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generate(name):
    """With beams, which reorder and repeat what a cache holds."""
    network, (ids, mask) = model(name, auto=AutoModelForCausalLM), batch(30)
    options = {"attention_mask": torch.ones_like(mask), "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    one, two = (network.generate(ids.clamp(min=5), **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(one, two)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [1, 2, 17, 30])
def test_a_sliding_window_is_kept(window, causal):
    """In blocks, over short texts, and over the last queries of a text: always under the mask of all its keys."""
    for queries, keys in ((100, 100), (20, 20), (1, 1), (1, 60), (7, 60)):
        if queries < keys and not causal:
            continue
        q, k, v = torch.randn(3, 2, 4, keys, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
        q, k, v = q[:, :, keys - queries :], k[:, :2], v[:, :2]
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[1, : keys // 5] = False
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        near = (distance < window) & (distance >= (0 if causal else 1 - window)) & mask[:, None, None]
        expected = F.scaled_dot_product_attention(q, k, v, near, scale=0.3, enable_gqa=True)
        output = sliding_attention(q, k, v, mask, window, causal, 0.3, 0.0)
        kept = mask[:, None, keys - queries :, None]
        torch.testing.assert_close(output * kept, expected.nan_to_num() * kept, rtol=0, atol=1e-12)


@pytest.mark.newest
def test_fields_are_those_of_the_configuration_and_stay(tmp_path):
    network = model("Llama", lsg={"block_size": 8, "num_global_tokens": 3})
    expected = states(network, "Llama", *batch())
    assert not torch.allclose(expected, states(model("Llama"), "Llama", *batch()), atol=1e-3)
    network.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).lsg == {"block_size": 8, "num_global_tokens": 3}
    again = AutoModel.from_pretrained(tmp_path, attn_implementation="lsg").double()
    assert torch.equal(states(again, "Llama", *batch()), expected)
    register_attention("lsg", **{**BLOCKS, "block_size": 8}, num_global_tokens=3)
    assert torch.equal(states(model("Llama"), "Llama", *batch()), expected)


@pytest.mark.newest
def test_a_bidirectional_llama():
    """By a field of its configuration, though its modules say that they are causal."""
    network, (ids, mask) = model("Llama", "lsg-long", is_causal=False), batch()
    for kept in (mask, torch.ones_like(mask)):
        output = states(network, "Llama", ids, kept)
        network.set_attn_implementation("sdpa")
        torch.testing.assert_close(output * kept[..., None], states(network, "Llama", ids, kept) * kept[..., None])
        network.set_attn_implementation("lsg-long")


@pytest.mark.newest
def test_a_module_that_does_not_say_whether_it_is_causal():
    q, k, v = torch.randn(3, 1, 4, 20, 8).unbind()
    with pytest.raises(ValueError, match=r"^is_causal: Module does not say whether a token sees those behind it$"):
        lsg_forward(BLOCKS, torch.nn.Module(), q, k, v, None)
    output, _ = lsg_forward({}, torch.nn.Module(), q, k, v, None, is_causal=True)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))


@pytest.mark.newest
@pytest.mark.parametrize("name", ["Llama", *(pytest.param(x, marks=pytest.mark.full) for x in ("Qwen3", "ModernBert"))])
def test_a_model_compiles_as_one_graph(name):
    """With a mask and without, where the model's positions may say that texts stand end to end; and windows."""
    network, (ids, mask) = model(name), batch()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    options = {} if name in ENCODERS else {"use_cache": False}
    for kept in (mask, None):
        output, expected = (x(ids, attention_mask=kept, **options).last_hidden_state for x in (compiled, network))
        weight = 1 if kept is None else kept[..., None]
        torch.testing.assert_close(output * weight, expected * weight, rtol=0, atol=1e-10)
    if name not in ENCODERS:
        with pytest.raises(RuntimeError, match=r"^attention_mask: .* some tokens see what others"):
            compiled(ids, position_ids=torch.arange(50)[None] % 30, **options)
    torch._dynamo.reset()


@pytest.mark.newest
@pytest.mark.parametrize("name", ["ModernBert", pytest.param("Llama", marks=pytest.mark.full)])
def test_a_model_is_exported(name):
    """A graph for batches of any size, and texts of three tokens or more."""
    network = model(name, use_cache=False)
    kept = ("input_ids", "attention_mask")
    dummy = dict(zip(kept, batch(16), strict=True))
    axes = dict.fromkeys(kept, dict.fromkeys((0, 1), torch.export.Dim.AUTO))
    graph = torch.export.export(network, (), dummy, dynamic_shapes=axes).module()
    for length in (3, 4, 5, 8, 9, 10, 17, 40, 77):
        for rows in (1, 3):
            ids, mask = (x[:rows] for x in batch(length))
            mask = mask if length > 8 else torch.ones_like(mask)
            output, expected = (x(input_ids=ids, attention_mask=mask).last_hidden_state for x in (graph, network))
            torch.testing.assert_close(output * mask[..., None], expected * mask[..., None], rtol=0, atol=1e-10)


@pytest.mark.newest
@pytest.mark.parametrize("length", [20, 40])
def test_an_encoder_decoder_keeps_its_cross_attention(length):
    """Also where both texts are of the same length. The rest is LSG, causal and not."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 60}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    network = AutoModel.from_config(transformers.BartConfig(**sizes, **heads), attn_implementation="lsg").eval()
    ids, mask = batch(40)
    with torch.no_grad():
        short = network(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :length]).last_hidden_state
    assert short.isfinite().all()
    layer = network.decoder.layers[0]
    crossing = [
        is_cross_attention(x) for x in (network.encoder.layers[0].self_attn, layer.self_attn, layer.encoder_attn)
    ]
    assert crossing == [False, False, True]
    q, k, v = torch.randn(3, 4, 4, 40, 8).unbind()
    output, _ = lsg_forward(BLOCKS, layer.encoder_attn, q[:, :, :length], k, v, mask, scaling=8**-0.5)
    kept = mask.bool()[:, None, None]
    expected = F.scaled_dot_product_attention(q[:, :, :length], k, v, kept).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    for name in ("Bert", "XLMRobertaXL", "Esm"):
        decoder = model(name, is_decoder=True, add_cross_attention=True)
        parts = {key: is_cross_attention(x) for key, x in decoder.named_modules() if key.endswith("attention.self")}
        assert parts == {key: "crossattention" in key for key in parts} and any(parts.values())


REFUSED = {
    "T5": ({"d_model": 32, "d_kv": 8, "num_layers": 1}, {}, "^position_bias: T5Attention .* adds no bias"),
    "Gemma2": (GROUPED, {}, "^softcap: Gemma2Attention .* does not cap scores"),
    "GptOss": ({**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, {}, "^s_aux: .* no attention sinks"),
    "Bloom": ({"n_layer": 1, "n_head": 4}, {}, "^attn_implementation: BloomModel computes its attention itself"),
    "Llama": (GROUPED, {"attention_mask": torch.ones(1, 1, 12, 12)}, r"^attention_mask: got shape \(1, 1, 12, 12\)"),
    "Qwen3": (GROUPED, {"position_ids": torch.arange(12)[None] % 7, "use_cache": False}, "^attention_mask: .* to end"),
    "Llama4Text": ({**GROUPED, "attention_chunk_size": 4, "num_local_experts": 2}, {}, "^attention_mask: .* chunks"),
    "Mistral": (GROUPED, {"output_attentions": True}, "^output_attentions: .* returns no probabilities"),
    "GPT2": (DECODERS["GPT2"], {"output_attentions": True}, "^output_attentions: .* returns no probabilities"),
}  # fmt: skip


@pytest.mark.newest
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_named(name):
    fields, more, message = REFUSED[name]
    ids = {"input_ids": torch.arange(12)[None]}
    if name == "T5":
        ids["decoder_input_ids"] = ids["input_ids"]
    with pytest.raises(ValueError, match=message) as caught:
        model(name, **fields)(**ids, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.newest
def test_a_name_and_fields_that_are_not_allowed():
    for name in ("flash-lsg", "owner/lsg", "lsg:fast", "sdpa"):
        with pytest.raises(ValueError, match=f"^name: got '{name}'; Transformers takes"):
            register_attention(name)
    AttentionInterface.register("other", partial(print))
    with pytest.raises(ValueError, match=r"^name: got 'other', which is another attention; use a new one"):
        register_attention("other")
    with pytest.raises(ValueError, match=r"^sparsity_type: got 'best'; allowed is one of none, norm"):
        register_attention("new", sparsity_type="best")
    with pytest.raises(ValueError, match=r"^block_size: got '8'; allowed is a whole number$"):
        register_attention("new", block_size="8")
    with pytest.raises(ValueError, match=r"^block: no field of LSG attention; use num_global_tokens"):
        register_attention("new", block=8)
    assert "new" not in AttentionInterface()
    with pytest.raises(ValueError, match=r"^block: no field of LSG attention"):
        states(model("Llama", lsg={"block": 8}), "Llama", *batch())
    with pytest.raises(ValueError, match=r"^attention_kernel: got 'best'; allowed is one of eager, cpu, .*, or none$"):
        register_attention("new", attention_kernel="best")
    with pytest.raises(ValueError, match=r"^lsg: got True in the configuration; it must be a dictionary"):
        states(model("Llama", lsg=True), "Llama", *batch())


@pytest.mark.newest
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_converted_checkpoint_is_not_touched(family, tmp_path):
    target = tmp_path / "lsg-model"
    assert run_command(GOLDEN / family / "source", target, "--quiet", "--no_verify") == 0
    load = partial(AutoModel.from_pretrained, target, trust_remote_code=True)
    ids = torch.arange(5, 45)[None]
    expected = load()(input_ids=ids).last_hidden_state
    register_attention("lsg", block_size=4, sparse_block_size=0)
    assert torch.equal(load()(input_ids=ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"^attn_implementation: got 'lsg'; LSG has 'eager' and 'sdpa'$"):
        load(attn_implementation="lsg")(input_ids=ids)
