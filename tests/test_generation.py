"""Decoders: nothing looks ahead, and each step with a cache gives what the pass over the whole text gives."""

import runpy
import sys
from pathlib import Path

import oracle
import peft
import pytest
import torch
from conftest import run_command
from hypothesis import given, strategies as st
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from lsg_converter import families
from lsg_converter.modeling.lsg_attention import lsg_attention
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


FAMILIES = ["bert", "camembert", "electra", "roberta", "xlm_roberta"]
ROOT = Path(__file__).parents[1]
SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "is_decoder": True}


@pytest.fixture(scope="session")
def decoder(golden, tmp_path_factory):
    """The family's recorded source, converted by the command as a decoder."""
    target = tmp_path_factory.mktemp(golden.name) / "lsg-decoder"
    architecture = next(iter(golden.causal_cases.values()))["architecture"]
    flags = ["--max_sequence_length", "1000", "--architecture", architecture, "--quiet"]
    assert run_command(golden.source, target, *flags) == 0
    return target


@pytest.fixture(scope="session")
def load(decoder):
    def load(auto_class=AutoModelForCausalLM, **kwargs):
        return auto_class.from_pretrained(decoder, trust_remote_code=True, **{**SMALL, **kwargs}).eval()

    return load


def text(model, rows=3, tokens=45, padding=(5, 3, 0)):
    """Ids, mask and positions of rows that are padded on the left."""
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(tokens) >= torch.tensor(padding[:rows])[:, None]).long()
    first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0) + first


@torch.no_grad()
def in_steps(model, sizes, ids, mask, positions, cache=None):
    """The logits of a text that is read in parts."""
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        outputs = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, start = outputs.past_key_values, stop
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.no_grad()
def test_recorded_numbers(golden, decoder, kernel):
    assert len(golden.causal_cases) >= 4
    for name, case in golden.causal_cases.items():
        inputs, outputs = (golden.tensors(f"case.{name}.{part}.") for part in ("in", "out"))
        real = inputs["attention_mask"].bool()
        options = {"trust_remote_code": True, "attn_implementation": kernel, **case["config"]}
        states = AutoModel.from_pretrained(decoder, **options).eval()(**inputs).last_hidden_state
        torch.testing.assert_close(states[real], outputs["last_hidden_state"][real], rtol=0, atol=2e-4, msg=name)
        if golden.name == "electra":
            continue  # Its source has no head that writes: the recorded one was drawn at random.
        logits = AutoModelForCausalLM.from_pretrained(decoder, **options).eval()(**inputs).logits
        keep, stride = real[:, :: case["logits_stride"]], case["logits_stride"]
        torch.testing.assert_close(logits[:, ::stride][keep], outputs["logits"][keep], rtol=0, atol=2e-4, msg=name)


@given(st.data())
def test_kernels_agree_with_the_oracle(data):
    g, length = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 40))
    kind = data.draw(st.sampled_from([kind for kind in SPARSITY_TYPES if kind != "lsh"]))
    block, sparse, factor = data.draw(st.sampled_from([(4, 4, 2), (8, 4, 2), (8, 4, 4), (4, 8, 1), (6, 2, 2)]))
    generator = torch.Generator().manual_seed(length)
    states = torch.randn(3, 2, 2, g + length, 8, generator=generator)
    mask = torch.rand(2, g + length, generator=generator) > data.draw(st.sampled_from([0, 0.3]))
    mask[:, :g] = True
    expected = torch.stack([
        oracle.attention(
            *states[:, row], mask[row], g=g, block=block, sparse=sparse, factor=factor, kind=kind, causal=True
        )
        for row in range(2)
    ])  # fmt: skip
    options = {
        "num_global_tokens": g, "block_size": block, "sparse_block_size": sparse, "sparsity_factor": factor,
        "sparsity_type": kind, "causal": True,
    }  # fmt: skip
    gradients = []
    for kernel in ("eager", "portable", "cpu"):
        leaves = [x.clone().requires_grad_() for x in states]
        output, _ = lsg_attention(*leaves, mask, **options, kernel=kernel)
        keep = torch.stack([torch.arange(g + length) <= (row.nonzero().max() if row.any() else -1) for row in mask])
        keep = (keep | (torch.arange(g + length) < g))[:, None, :, None]
        torch.testing.assert_close(output * keep, (expected * keep).float(), rtol=0, atol=1e-5, msg=kernel)
        gradients.append(torch.autograd.grad((output * keep).square().sum(), leaves))
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=0, atol=1e-4)


def test_full_attention_beyond_two_blocks_is_refused(load):
    x = torch.randn(1, 1, 30, 8)
    with pytest.raises(
        ValueError, match="full_attention_length: got 20; the causal form allows two blocks, 8, or none"
    ):
        mask = torch.ones(1, 30, dtype=torch.bool)
        lsg_attention(x, x, x, mask, block_size=4, sparse_block_size=4, full_attention_length=20, causal=True)
    with pytest.raises(Exception, match="full_attention_length: got 20; allowed is none, or two blocks, 8"):
        load(full_attention_length=20)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@torch.no_grad()
def test_no_token_changes_a_state_before_it(load, golden, kind):
    if golden.name != "bert":
        pytest.skip("one family shows it")
    for kernel in ("eager", "sdpa"):
        model = load(sparsity_type=kind, attn_implementation=kernel, num_global_tokens=2).double()
        ids, _, _ = text(model, rows=1, tokens=37, padding=(0,))
        before = model(ids).logits
        changed = ids.repeat(37, 1)
        changed[range(37), range(37)] = ids[0] % 50 + 51
        differs = (model(changed).logits - before).abs().amax(-1) > 1e-12
        assert not differs.tril(-1).any()  # of the state at a place, by the token that changes behind it
        assert differs[range(1, 37), range(1, 37)].all()  # while its own state changes; the first one is pooled


# What a step sees differs by the sizes of windows, chunks and blocks, and by what is in front of the text.
FIELDS = [
    {},
    {"num_global_tokens": 0},
    {"num_global_tokens": 3, "sparsity_factor": 4, "block_size": 8},
    {"mask_first_token": True},
    {"sparse_block_size": 8, "sparsity_type": "pooling"},
    {"sparse_block_size": 2, "block_size": 6},
]


@pytest.mark.few_families
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_steps_equal_the_whole(load, kind):
    for number, fields in enumerate(FIELDS):
        kernel = ("eager", "sdpa")[number % 2]
        model = load(**{"sparsity_type": kind, "attn_implementation": kernel, **fields}).double()
        inputs = text(model)
        with torch.no_grad():
            whole = model(inputs[0], attention_mask=inputs[1], position_ids=inputs[2], use_cache=False).logits
        for sizes in ([7, *[1] * 38], [21, 1, 3, 20], [10, 3, 1, 5, 9, 17], [8, 1, 36], [40, 5], [45]):
            logits = in_steps(model, sizes, *inputs)
            difference = ((logits - whole).abs() * inputs[1][:, :, None]).max()
            assert difference < 1e-10, (fields, kernel, sizes)


# No token ends a text: this one is not in the vocabulary.
GENERATION = {"max_new_tokens": 30, "eos_token_id": 10**6, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.few_families
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_generation_is_the_same_with_and_without_a_cache(load, options):
    model = load()
    ids, mask, _ = text(model, rows=2, tokens=17)
    options = {"do_sample": False, "pad_token_id": model.config.pad_token_id, **GENERATION, **options}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for logits, others in zip(*(result.logits for result in results), strict=True):
        torch.testing.assert_close(logits, others, rtol=0, atol=1e-4)


@pytest.mark.few_families
def test_caches_that_grow_shrink_and_stay(load):
    model = load()
    ids, _, _ = text(model, rows=1, tokens=17, padding=(0,))
    options = {"do_sample": False, "pad_token_id": model.config.pad_token_id, **GENERATION}
    expected = model.generate(ids, **options).sequences
    assisted = {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}
    static = {"cache_implementation": "static", "disable_compile": True}
    for more in (*assisted, static, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        given = {} if "inputs_embeds" in more else {"input_ids": ids}
        written = model.generate(**given, **options, **more).sequences
        assert torch.equal(written, expected if given else expected[:, 17:]), more
    # A text that goes on.
    cache = DynamicCache()
    start = model.generate(ids, past_key_values=cache, **{**options, "max_new_tokens": 10}).sequences
    longer = torch.cat([start, ids[:, :9]], dim=1)
    again = model.generate(longer, past_key_values=cache, **options).sequences
    assert torch.equal(again, model.generate(longer, **options).sequences)
    # Rows that change places, and are more, as in beams.
    with torch.no_grad():
        outputs = model(torch.cat([ids, ids.flip(1)]), use_cache=True)
        outputs.past_key_values.reorder_cache(torch.tensor([1, 0]))
        step = model(ids[:, :1].repeat(2, 1), past_key_values=outputs.past_key_values).logits
        whole = model(torch.cat([torch.cat([ids.flip(1), ids]), ids[:, :1].repeat(2, 1)], dim=1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, rtol=0, atol=1e-4)


@pytest.mark.few_families
def test_a_step_does_not_copy_the_cache(load):
    model = load()
    ids, _, _ = text(model, rows=1, tokens=30, padding=(0,))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        places = set()
        for _ in range(20):
            model(ids[:, :1], past_key_values=cache)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    assert cache.get_seq_length() == 50


@pytest.mark.full
def test_a_static_cache_in_a_compiled_graph(load):
    model = load()
    ids, mask, _ = text(model, rows=2, tokens=17)
    options = {"do_sample": False, "pad_token_id": model.config.pad_token_id, "attention_mask": mask, **GENERATION}
    static = model.generate(ids, cache_implementation="static", **options).sequences
    assert torch.equal(static, model.generate(ids, **options).sequences)


@pytest.mark.few_families
def test_a_decoder_trains(load):
    for fields in ({}, {"attn_implementation": "eager"}):
        model = load(**fields).train()
        model.gradient_checkpointing_enable()
        ids, mask, positions = text(model)
        model(ids, attention_mask=mask, position_ids=positions, labels=ids).loss.backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
        assert model.base_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.few_families
def test_what_a_decoder_refuses(load):
    model = load()
    ids, mask, _ = text(model)
    with pytest.raises(ValueError, match="global_attention_mask: got one for a decoder"):
        model(ids, global_attention_mask=mask)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(3, 1\); beside a cache it must be .* \(3, 46\)"):
        model(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"got a text of 1000 tokens behind 45 in a cache; .* for 955 more"):
        model(torch.ones(3, 1000, dtype=torch.int64), past_key_values=cache)


@pytest.mark.few_families
def test_short_texts_are_those_of_the_stock_model(load, golden):
    """Without global tokens, in two blocks."""
    stock = AutoModelForCausalLM.from_pretrained(golden.source, is_decoder=True).eval()
    model = load(num_global_tokens=0, block_size=8)
    model.load_state_dict({**model.state_dict(), **{
        name: x for name, x in stock.state_dict().items() if "position_embeddings" not in name
    }})  # fmt: skip
    ids, _, positions = text(model, tokens=16)
    with torch.no_grad():
        ours, theirs = (x(ids, position_ids=positions).logits for x in (model, stock))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_command_says_what_it_makes(bert, tmp_path, capsys):
    flags = ["--architecture", "BertLMHeadModel", "--max_sequence_length", "900"]
    assert run_command(bert.source, tmp_path / "lsg", *flags) == 0
    shown = capsys.readouterr().out
    for line in ("causal (is_decoder)", "change none before", "the same in steps and at once", "keeps the token's own"):
        assert line in shown, line
    assert run_command(bert.source, tmp_path / "lsg-exact", *flags, "--exact") != 0
    assert "--exact: got it for a decoder" in capsys.readouterr().err
    assert not (tmp_path / "lsg-exact").exists()
    assert families.family("bert").is_causal(families.family("bert").architectures["BertLMHeadModel"])


@pytest.mark.newest
def test_the_benchmark_runs(monkeypatch, capsys):
    script = ROOT / "experiments" / "efficiency" / "generation.py"
    small = ["--lengths", "300", "600", "--layers", "1", "--steps", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [str(script), *small])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["300", "600"]


@pytest.mark.few_families
@pytest.mark.parametrize("kind", ["norm", "bos_pooling"])
@torch.no_grad()
def test_rows_of_a_cache_change_places(load, kind):
    """What weighs by the first token's query follows the row."""
    model = load(sparsity_type=kind, dtype=torch.float64)
    ids, mask, positions = text(model, padding=(0, 2, 3))
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 30:]
    changes = {
        "reorder_cache": ([2, 0, 1], torch.tensor([2, 0, 1])),
        "batch_select_indices": ([2, 1], torch.tensor([2, 1])),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], 2),
    }
    for name, (rows, argument) in changes.items():
        cache = DynamicCache()
        model(ids[:, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], past_key_values=cache)
        getattr(cache, name)(argument)
        behind = {"attention_mask": mask[rows], "position_ids": positions[rows, 30:], "past_key_values": cache}
        torch.testing.assert_close(model(ids[rows, 30:], **behind).logits, whole[rows], rtol=0, atol=1e-10, msg=name)


@pytest.mark.few_families
@torch.no_grad()
def test_a_cache_that_another_filled(load):
    ids = text(load())[0][:1]
    for kind in ("norm", "bos_pooling"):
        model = load(sparsity_type=kind, dtype=torch.float64)
        positions = torch.arange(45)[None] + 2  # RoBERTa's stock model would begin anew in a step
        filled = model(ids[:, :30], position_ids=positions[:, :30], use_cache=True).past_key_values
        cache = DynamicCache([(layer.keys, layer.values) for layer in filled.layers])
        if kind == "bos_pooling":
            with pytest.raises(ValueError, match="past_key_values: got a cache with a text whose first token"):
                model(ids[:, 30:], past_key_values=cache)
            continue
        whole = model(ids, position_ids=positions, use_cache=False).logits[:, 30:]
        step = model(ids[:, 30:], position_ids=positions[:, 30:], past_key_values=cache).logits
        torch.testing.assert_close(step, whole, rtol=0, atol=1e-10)


@pytest.mark.full
@torch.no_grad()
def test_a_compiled_decoder_reads_a_text_from_its_start(bert, tmp_path):
    target = tmp_path / "lsg"
    assert run_command(bert.source, target, "--architecture", "BertLMHeadModel", "--quiet", "--no_verify") == 0
    options = {"trust_remote_code": True, "sparsity_type": "bos_pooling", "dtype": torch.float64}
    model = AutoModelForCausalLM.from_pretrained(target, **SMALL | options).eval()
    ids, others = (torch.randint(5, 100, (1, 40), generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, expected, rtol=0, atol=1e-10)  # with a cache of its own
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(others, past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(compiled(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-10)
    torch._dynamo.reset()


@torch.no_grad()
def test_generation_stops_where_positions_end(load, golden):
    if golden.name != "bert":
        pytest.skip("the same for all")
    model = load()
    with pytest.raises(ValueError, match=r"got a text of 1 tokens behind 1000 in a cache; .* for 0 more"):
        model.generate(torch.full((1, 995), 7), max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_prefixes_of_a_decoder_train(load, golden):
    if golden.name != "bert":
        pytest.skip("the same for all")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    model = peft.get_peft_model(load(), config)
    ids = text(model)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(x.grad.abs().max() > 0 for x in model.parameters() if x.requires_grad)
    model.eval()
    assert model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False).shape == (1, 50)
