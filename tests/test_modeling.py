"""One battery over every family: what a converted model does, loaded from disk as a user loads it."""

import copy
import importlib
import inspect
import json
from inspect import signature
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from made import LIKE
from safetensors.torch import load_file
from strategies import KINDS, batches
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel
from transformers.models.auto import modeling_auto

from lsg_converter import families
from lsg_converter.families import stock_class
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


LIMIT = 1000
SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2}
KERNELS = ["eager", "sdpa"]


@pytest.fixture
def load(converted, family):
    """Load the converted checkpoint with small blocks, which a few tokens fill: a head, or what reads a text."""

    def load(auto_class=None, **kwargs):
        kwargs = {**SMALL, **kwargs}
        if family.config_class.is_encoder_decoder:
            kwargs = {"pass_global_tokens_to_decoder": False, **kwargs}
        model = (auto_class or AutoModel).from_pretrained(converted, trust_remote_code=True, **kwargs).eval()
        return model if auto_class else reader(model)

    return load


def reader(model):
    """What reads a text: the base model, or its encoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


@pytest.fixture
def family(golden):
    return families.family(json.loads((golden.source / "config.json").read_text())["model_type"])


def ids_of(model, rows, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)


def states(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


def heads(family):
    return [name for name in family.auto_map if name != "AutoConfig"]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Lengths


@pytest.mark.parametrize("tokens", [1, LIMIT])
def test_the_shortest_and_the_longest_text(load, tokens):
    model = load()
    output = states(model, ids_of(model, 2, tokens))
    assert output.shape == (2, tokens, model.config.hidden_size) and output.isfinite().all()


@pytest.mark.parametrize("tokens", [0, LIMIT + 1])
def test_a_length_that_does_not_fit_is_an_error(load, tokens):
    model = load()
    with pytest.raises(ValueError, match=rf"input_ids: got a text of {tokens} tokens"):
        model(ids_of(model, 1, tokens))
    embeds = torch.zeros(1, tokens, model.get_input_embeddings().weight.shape[1])
    with pytest.raises(ValueError, match=rf"got a text of {tokens} tokens"):
        model(inputs_embeds=embeds)


def test_a_batch_of_no_texts_is_an_error(load):
    model = load()
    with pytest.raises(ValueError, match="input_ids: got a batch of 0 texts; at least 1 is needed"):
        model(ids_of(model, 0, 30))


@pytest.mark.made_families
def test_resized_tables(load, converted, family):
    """New words can be read, and texts as long as a new table of positions where the stock model has such a method."""
    model = AutoModel.from_pretrained(converted, trust_remote_code=True, **SMALL).eval()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert states(reader(model), ids_of(model, 2, 30) * 0 + model.config.vocab_size - 1).isfinite().all()
    if stock_class(family.base_class).resize_position_embeddings is PreTrainedModel.resize_position_embeddings:
        with pytest.raises(NotImplementedError, match="`resize_position_embeddings` is not implemented for"):
            model.resize_position_embeddings(LIMIT + 200)
        return
    ids = ids_of(model, 1, 30)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    before = states(model, ids, **more)
    for tokens in (LIMIT + 200, 30):
        model.resize_position_embeddings(tokens)
        assert torch.equal(states(model, ids, **more), before)
        assert states(model, ids_of(model, 1, tokens), **more).isfinite().all()
        with pytest.raises(ValueError, match=f"got a text of {tokens + 1} tokens; this checkpoint has positions for"):
            model(ids_of(model, 1, tokens + 1), **more)


def test_without_adaptive_a_length_must_be_whole_blocks(load):
    model, adaptive = load(adaptive=False), load()
    for tokens in (1, 7, 8, 12, 16):
        ids = ids_of(model, 1, tokens)
        assert torch.equal(states(model, ids), states(adaptive, ids))
    with pytest.raises(ValueError, match=r"adaptive=False it must be a multiple of block_size, 4"):
        model(ids_of(model, 1, 9))


# Masks


@settings(max_examples=settings().max_examples // 3)
@given(
    batch=st.sampled_from(KINDS).flatmap(batches),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32]),
)
def test_a_row_is_the_same_alone_and_in_a_batch(load, batch, dtype):
    """By eager, and by sdpa, padded and with other tokens under its mask."""
    fields, rows = batch
    rows = [row[fields["num_global_tokens"] :] for row in rows]
    mask = pad_sequence(rows, batch_first=True)
    model = load(dtype=torch.float64, **fields)
    ids = ids_of(model, *mask.shape)
    others = torch.where(mask, ids, ids.flip(1))
    others[:, 0] = ids[:, 0]  # by whose query "bos_pooling" weighs, masked or not
    together = states(model, others, attention_mask=mask.to(dtype))
    model.set_attn_implementation("eager")
    for i, row in enumerate(rows):
        alone = states(model, ids[i : i + 1, : len(row)], attention_mask=row[None].to(dtype))[0]
        close(together[i, : len(row)][row], alone[row], atol=1e-10)


@pytest.mark.made_families
@pytest.mark.parametrize("kernel", ["eager", "cpu", "portable"])
@pytest.mark.parametrize("kind", ["norm", "bos_pooling"])
def test_padding_on_the_left_changes_nothing_where_positions_follow_it(load, kind, kernel):
    """Or where they are given: blocks count from the first token, and so do hidden states and probabilities."""
    options = {"attn_implementation": "eager"} if kernel == "eager" else {"attention_kernel": kernel}
    model = load(dtype=torch.float64, sparsity_type=kind, mask_first_token=True, **options)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not (model.positions_follow_padding or takes_positions):
        pytest.skip("positions count from place 0")
    ids, padding = ids_of(model, 2, 30), model.config.pad_token_id
    outputs = []
    for left in (0, 1, 6):
        padded = torch.nn.functional.pad(ids, (left, 5), value=padding)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 5))
        mask[1, left + 20 :] = 0
        more = {}
        if not model.positions_follow_padding:
            more["position_ids"] = (torch.arange(left + 35) - left).clamp(min=0).expand(2, -1)
        padded[mask == 0] = padding
        output = model(
            padded, attention_mask=mask, output_hidden_states=True, output_attentions=kernel == "eager", **more
        )
        own = slice(left, left + 20)
        taken = [output.last_hidden_state[:, own], *(state[:, own] for state in output.hidden_states)]
        if kernel == "eager":
            taken += [attention[:, :, own] for attention in output.attentions]
            taken += [attention[..., 1 + left : 1 + left + 20] for attention in output.global_attentions]
        outputs.append(taken)
        assert torch.equal(output.last_hidden_state[0, 0], output.last_hidden_state[0, left])  # which heads read
    for other in outputs[1:]:
        for expected, actual in zip(outputs[0], other, strict=True):
            close(actual, expected, atol=1e-10)


@pytest.mark.made_families
def test_padding_on_the_left_is_said_once_where_it_changes_what_a_row_gives(load, caplog):
    model = load()
    ids = ids_of(model, 2, 30)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[0, 25:] = left[0, :5] = 0
    positions = torch.arange(30)[None].expand(2, -1)

    def said(mask, **more):
        caplog.clear()
        model(ids, attention_mask=mask, **more)
        return [record.message for record in caplog.records if "padding on the left" in record.message]

    transformers.logging.get_logger().addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    try:
        assert not said(right)
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if takes_positions:
            assert not said(left, position_ids=positions)
        first, again = said(left), said(left)
        moves = model.find_first_token({"attention_mask": left}) is None
        assert len(first) == moves and not again
        assert all(("give position_ids" in line) is takes_positions for line in first)
    finally:
        transformers.logging.get_logger().removeHandler(caplog.handler)


@pytest.mark.made_families
@pytest.mark.parametrize("kernel", ["eager", "cpu", "portable"])
def test_tokens_that_see_all(load, kernel):
    """`global_attention_mask`, by row: one layer carries a token at the start to one far away, and back."""
    options = {"attn_implementation": "eager"} if kernel == "eager" else {"attention_kernel": kernel}
    model = load(dtype=torch.float64, num_global_tokens=0, pool_with_global=False, **options)
    ids = ids_of(model, 3, 61)
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    chosen = torch.zeros_like(ids)
    chosen[0, :3] = chosen[1, 2] = chosen[1, 55] = 1

    def layer(ids, chosen):
        return model(ids, attention_mask=mask, global_attention_mask=chosen, output_hidden_states=True).hidden_states[1]

    def changed(place, chosen):
        other = ids.clone()
        other[:, place] = (ids[:, place] - 5 + 1) % 50 + 5
        return (layer(other, chosen) != layer(ids, chosen)).any(-1)

    assert not changed(2, torch.zeros_like(ids))[:, 40].any()
    assert changed(2, chosen)[:, 40].tolist() == [True, True, False]
    far = changed(45, chosen)
    assert far[:, 2].tolist() == [True, True, False] and far[:, 0].tolist() == [True, False, False]
    for row in range(3):  # alone as in the batch
        length = int(mask[row].sum())
        own = [x[row : row + 1, :length] for x in (ids, mask, chosen)]
        alone = states(model, own[0], attention_mask=own[1], global_attention_mask=own[2])
        close(
            states(model, ids, attention_mask=mask, global_attention_mask=chosen)[row : row + 1, :length],
            alone,
            atol=1e-10,
        )


@pytest.mark.parametrize("g", [0, 1])
def test_a_first_token_that_is_no_key_has_its_state(load, g):
    """With `mask_first_token`, also where the rest of its row is padding, or promoted."""
    options = {"dtype": torch.float64, "num_global_tokens": g, "mask_first_token": True}
    models = [load(attn_implementation="eager", **options), load(**options)]
    ids = ids_of(models[0], 3, 30)
    mask, chosen = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, 1:] = 0
    chosen[1, 1:] = 1
    (eager, sdpa) = (states(model, ids, attention_mask=mask, global_attention_mask=chosen) for model in models)
    close(sdpa[mask.bool()], eager[mask.bool()], atol=1e-10)


def test_positions_that_nobody_reads_change_nothing(load):
    model = load()
    if "position_ids" in inspect.signature(model.forward).parameters:
        pytest.skip("it reads them")
    ids, mask = ids_of(model, 1, 30), torch.ones(1, 30)
    mask[:, :3] = 0
    assert torch.equal(
        states(model, ids, attention_mask=mask, position_ids=torch.arange(30)[None]),
        states(model, ids, attention_mask=mask),
    )
    with pytest.raises(ValueError, match="got a text of 1001 tokens"):
        model(ids_of(model, 1, LIMIT + 1), position_ids=torch.arange(LIMIT + 1)[None])


def test_tokens_that_see_all_are_told_right(load):
    model = load()
    ids = ids_of(model, 1, 61)
    with pytest.raises(ValueError, match=r"global_attention_mask: got shape \(1, 60\); it must be .* \(1, 61\)"):
        model(ids, global_attention_mask=torch.ones(1, 60))
    ids = ids_of(model, 1, 600)
    with pytest.raises(ValueError, match=r"got 512 tokens in a row, beside 1 global tokens; allowed are 512"):
        model(ids, global_attention_mask=(torch.arange(600) < 512)[None])
    mask = (torch.arange(600) < 20)[None]  # what is masked does not count
    assert (
        states(model, ids, attention_mask=mask, global_attention_mask=(torch.arange(600) < 512)[None]).isfinite().all()
    )
    short = ids_of(model, 1, 8)  # full attention anyway
    assert torch.equal(states(model, short, global_attention_mask=torch.ones(1, 8)), states(model, short))


def test_a_text_without_a_batch_is_told_right(load):
    with pytest.raises(ValueError, match=r"^input_ids: got shape \(30,\); it must be \(batch, tokens\)$"):
        load()(torch.arange(30))


def test_an_unknown_argument_is_said_once(load, caplog):
    model = load()
    transformers.logging.get_logger().addHandler(caplog.handler)
    for _ in range(2):
        model(ids_of(model, 1, 30), global_atention_mask=1)
    transformers.logging.get_logger().removeHandler(caplog.handler)
    assert sum("global_atention_mask" in record.message for record in caplog.records) == 1


@pytest.mark.made_families
@pytest.mark.parametrize("g", [0, 3])
def test_a_batch_takes_what_its_real_tokens_take(load, g):
    """No layer sees what a row is padded with on the right, and a padded batch gives and trains as its rows alone."""
    model = load(dtype=torch.float64, num_global_tokens=g).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "layerdrop"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    ids, tokens = ids_of(model, 5, 30), [30, 3, 9, 0, 17]
    mask = (torch.arange(30) < torch.tensor(tokens)[:, None]).long()
    mask[0, :2] = mask[4, 5] = 0
    weight = torch.randn(5, 30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = set()
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features > 16 and not name.startswith("embeddings.")
    ]
    hooks = [layer.register_forward_hook(lambda _, args, __: seen.add(args[0].shape[:-1].numel())) for layer in layers]
    packed = model(ids, attention_mask=mask, output_hidden_states=True)
    (packed.last_hidden_state * weight * mask[:, :, None]).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    # Left out too, where blocks count from the first token.
    left = 0 if model.find_first_token({"attention_mask": mask}) is None else 2
    assert max(seen) == sum(g + max(length, 1) for length in tokens) - left
    for hook in hooks:
        hook.remove()
    for row, length in enumerate(tokens):
        if length:
            alone = model(
                ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length], output_hidden_states=True
            )
            (alone.last_hidden_state * (weight * mask[:, :, None])[row, :length]).sum().backward()
            for one, whole in zip(alone.hidden_states, packed.hidden_states, strict=True):
                assert whole.shape == (5, 30, one.shape[-1])
                close(whole[row, :length], one[0], atol=1e-10)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        if grad is not None:
            # DeBERTa makes some of its biases in float32, whatever it is asked for.
            close(parameter.grad, grad, atol=1e-8 if grad.dtype == torch.float64 else 1e-6)


def test_lsh_is_reproducible_and_leaves_the_random_state_alone(load):
    model = load(sparsity_type="lsh")
    ids = ids_of(model, 2, 61)
    before = torch.get_rng_state()
    expected = states(model, ids)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(states(model, ids), expected)
    assert not torch.equal(states(load(sparsity_type="lsh", lsh_seed=1), ids), expected)


def test_a_mask_of_another_shape_is_an_error(load):
    model = load()
    ids = ids_of(model, 2, 30)
    for shape in ((2, 29), (1, 30), (2, 30, 30), (2, 1, 30, 30)):
        with pytest.raises(ValueError, match=r"attention_mask: got shape .* it must be \(batch, tokens\), \(2, 30\)"):
            model(ids, attention_mask=torch.ones(shape))


def test_inputs_are_not_written_to(load):
    model = load(mask_first_token=True)
    ids, mask = ids_of(model, 2, 30), torch.ones(2, 30, dtype=torch.bool)
    mask[0, 20:] = False
    before = ids.clone(), mask.clone()
    states(model, ids, attention_mask=mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


# Other inputs


@pytest.mark.made_families
def test_inputs_embeds_equal_ids(load):
    model = load()
    ids = ids_of(model, 2, 30)
    embeds = model.get_input_embeddings()(ids)
    if getattr(model, "scales_outside", False):
        embeds = embeds * model.embed_scale
    if model.config.model_type == "esm":  # which means by them what its embeddings give
        embeds = model.embeddings(ids)
    assert torch.equal(states(model, inputs_embeds=embeds), states(model, ids))


@pytest.mark.made_families
def test_token_types_matter(load):
    model = load()
    if not getattr(model.config, "type_vocab_size", 0) > 1:
        pytest.skip("the family has one token type")
    ids = ids_of(model, 1, 30)
    types = torch.zeros_like(ids)
    assert torch.equal(states(model, ids, token_type_ids=types), states(model, ids))
    types[:, 20:] = 1
    assert not torch.allclose(states(model, ids, token_type_ids=types), states(model, ids), atol=1e-3)


@pytest.mark.made_families
def test_arguments_by_position_and_the_stock_signature(load):
    model = load()
    assert str(signature(model.forward)) == str(signature(stock_class(type(model)).forward.__get__(model)))
    ids, mask = ids_of(model, 1, 30), torch.ones(1, 30)
    mask[:, 20:] = 0
    names = list(signature(model.forward).parameters)
    by_position = [ids, *[None] * (names.index("attention_mask") - 1), mask]
    assert torch.equal(model(*by_position)[0], model(input_ids=ids, attention_mask=mask)[0])


# A cache in front of the text, as prefix tuning gives it


def cache_of(model, tokens):
    """For two rows; and the states that it is made of, which want gradients."""
    config, cache = model.config, DynamicCache()
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, 2, 2, heads, tokens, config.hidden_size // heads)
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=model.dtype).requires_grad_()
    for layer, (key, value) in enumerate(leaf):
        cache.update(key, value, layer)
    return cache, leaf


def skip_without_cache(model):
    if not (model.takes_cache and {"past_key_values", "cache"} & {*signature(model.forward).parameters}):
        with pytest.raises(ValueError, match=r"past_key_values: got a cache; LSG.*, reads none"):
            model(ids_of(model, 2, 8), past_key_values=cache_of(model, 3)[0])
        pytest.skip("the stock model has no caches")


@pytest.mark.made_families
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_in_front_of_a_short_text_is_as_in_the_stock_model(load, golden, family, kernel):
    options = {"attn_implementation": kernel, "dtype": torch.float64}
    model = load(num_global_tokens=0, **options)
    skip_without_cache(model)
    options["attn_implementation"] = "eager"  # Some stock models have no other.
    stock = stock_class(family.base_class).from_pretrained(golden.source, **options).eval()
    ids = ids_of(model, 2, 8)
    mask = torch.ones(2, 3 + 8)
    mask[0, 1] = mask[0, -2:] = 0
    for given_mask in (mask, None):
        results = []
        for each in (stock, model):
            cache, leaf = cache_of(each, 3)
            outputs = each(ids, attention_mask=given_mask, past_key_values=cache, output_attentions=kernel == "eager")
            (outputs.last_hidden_state * mask[:, 3:, None]).square().sum().backward()
            hidden = outputs.last_hidden_state[mask[:, 3:].bool()]
            results.append([hidden, leaf.grad, *(outputs.attentions or ())])
        hidden_from = 0 if given_mask is None else leaf[:, :, 0, :, 1, 0].numel()
        assert leaf.grad.any(-1).sum() == leaf[..., 0].numel() - hidden_from
        for expected, actual in zip(*results, strict=True):
            close(actual, expected, atol=1e-10)
    with pytest.raises(ValueError, match=rf"text of {LIMIT} tokens behind 3 in a cache; .* for {LIMIT - 3} more;"):
        model(ids_of(model, 2, LIMIT), past_key_values=cache_of(model, 3)[0])


@pytest.mark.parametrize("other", ["nothing", "padding on the left", "a promoted token"])
def test_a_cache_in_front_of_a_long_text(load, other):
    """All tokens see it. Kernels agree, and so do a prefix that is hidden and none."""
    results, more = [], {}
    if other == "a promoted token":
        more["global_attention_mask"] = (torch.arange(30) == 7).repeat(2, 1)
    for kernel in KERNELS:
        model = load(attn_implementation=kernel, dtype=torch.float64, num_global_tokens=2, pool_with_global=False)
        skip_without_cache(model)
        ids, mask = ids_of(model, 2, 30), torch.ones(2, 3 + 30)
        mask[0, -9:] = 0
        if other == "padding on the left":
            mask[1, 3:8] = 0
        cache, leaf = cache_of(model, 3)
        outputs = model(ids, attention_mask=mask, past_key_values=cache, output_attentions=kernel == "eager", **more)
        (outputs.last_hidden_state * mask[:, 3:, None]).square().sum().backward()
        results.append((outputs.last_hidden_state[mask[:, 3:].bool()], leaf.grad))
        (plain,) = [p.grad for n, p in model.named_parameters() if "global_embeddings" in n]
        assert plain[:2].ne(0).any(dim=1).all()
        if kernel == "eager":
            heads = model.config.num_attention_heads
            copies = len(more)
            assert {a.shape for a in outputs.attentions} == {(2, heads, 30, 3 + 2 + copies + 3 * 4 + 2 * 4)}
            assert {a.shape for a in outputs.global_attentions} == {(2, heads, 2 + copies, 3 + 2 + copies + 30)}
            seen = torch.cat([a[:, :, -15:] for a in outputs.attentions], dim=2)[..., :3]
            assert (seen > 0).all() and all((a[..., :3] > 0).all() for a in outputs.global_attentions)
        real, positions = mask[1, 3:].bool(), torch.arange(30)[None] + model.special_positions(model.config)
        hidden = mask.clone()
        hidden[:, :3] = 0
        close(
            states(
                model, ids, attention_mask=hidden, past_key_values=cache_of(model, 3)[0], position_ids=positions, **more
            )[1, real],
            states(model, ids, attention_mask=mask[:, 3:], position_ids=positions, **more)[1, real],
            atol=1e-10,
        )
    for one, other in zip(*results, strict=True):
        close(one, other, atol=1e-10)


# Short texts are those of the plain model


@pytest.mark.made_families
@pytest.mark.parametrize("kernel", KERNELS)
def test_short_texts_without_globals_equal_the_stock_model(load, golden, family, kernel):
    options = {"attn_implementation": kernel, "dtype": torch.float64}
    model, stock_type = load(num_global_tokens=0, **options), stock_class(family.base_class)
    if not stock_type._supports_sdpa:
        options["attn_implementation"] = "eager"
    stock = reader(stock_type.from_pretrained(golden.source, **options).eval())
    # Their plain attention has its softmax in float32; that of older T5 too.
    rounds = golden.name in ("layoutlm", "markuplm", "splinter") and options["attn_implementation"] == "eager"
    rounds = rounds or golden.name == "deberta"  # And so has the plain LayerNorm of this one.
    rounds = rounds or (golden.name in ("t5", "mt5", "umt5") and not stock_type._supports_sdpa)
    for tokens in (1, 5, 8):
        ids = ids_of(model, 2, tokens)
        mask = torch.ones_like(ids)
        mask[0, (tokens + 1) // 2 :] = 0
        expected, actual = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (stock, model))
        for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
            close(a[mask.bool()], b[mask.bool()], atol=1e-5 if rounds else 1e-10)


# Outputs


@pytest.mark.made_families
@pytest.mark.parametrize("tokens", [6, 30])
def test_hidden_states_have_the_positions_of_the_text(load, tokens):
    model = load(num_global_tokens=3, pool_with_global=False)
    ids = ids_of(model, 2, tokens)
    outputs = model(ids, output_hidden_states=True)
    as_tuple = model(ids, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for hidden_states in (outputs.hidden_states, as_tuple[-1]):
        assert len(hidden_states) == model.config.num_hidden_layers + 1
        assert all(state.shape == (2, tokens, model.config.hidden_size) for state in hidden_states)
        assert torch.equal(hidden_states[-1], outputs.last_hidden_state)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], outputs.last_hidden_state)


def test_pooling_with_the_global_token(load):
    """What differs is the first token, and what is computed from it."""
    ids = ids_of(load(), 2, 30)
    with_global, without = (load(pool_with_global=flag)(ids, output_hidden_states=True) for flag in (True, False))
    assert torch.equal(with_global.last_hidden_state[:, 1:], without.last_hidden_state[:, 1:])
    assert not torch.allclose(with_global.last_hidden_state[:, 0], without.last_hidden_state[:, 0], atol=1e-3)
    if "pooler_output" in with_global:
        assert not torch.allclose(with_global.pooler_output, without.pooler_output, atol=1e-3)


@pytest.mark.made_families
def test_attentions(load):
    model = load(attn_implementation="eager", num_global_tokens=3)
    config, width = model.config, 3 + 3 * 4 + 2 * 4
    for tokens, keys in ((6, 6), (20, width), (30, width)):  # with 20 a window has as many keys as the text
        outputs = model(ids_of(model, 2, tokens), output_attentions=True)
        shape = (2, config.num_attention_heads, tokens, keys)
        assert [a.shape for a in outputs.attentions] == [shape] * config.num_hidden_layers
        shape = (2, config.num_attention_heads, 3, 3 + tokens)
        assert [a.shape for a in outputs.global_attentions] == [shape] * config.num_hidden_layers
        close(outputs.global_attentions[0].sum(-1), torch.ones(shape[:-1]))
    close(outputs.attentions[0].sum(-1), torch.ones(2, config.num_attention_heads, 30))


@pytest.mark.made_families
def test_what_a_kernel_cannot_give(load):
    model = load()
    # As Transformers' own models: the fused kernel has none to give.
    assert not model(ids_of(model, 1, 30), output_attentions=True).attentions
    with pytest.raises(ValueError, match=r"flex_attention"):
        load(attn_implementation="flex_attention")
    model.set_attn_implementation("eager")
    assert model(ids_of(model, 1, 30), output_attentions=True).attentions


# Heads


def run_head(name, model, tokens=30):
    ids = ids_of(model, 2, tokens)
    ids[:, 3] = getattr(model.config, "question_token_id", 7)  # where Splinter's heads look
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids[:, None] if name == "AutoModelForMultipleChoice" else ids)
    ids[:, -1] = model.config.eos_token_id
    return model(input_ids=ids, decoder_input_ids=ids)


def without_dropout(model):
    for module in model.modules():
        for field in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.made_families
def test_every_head_of_transformers_is_there(family):
    module = importlib.import_module(stock_class(family.base_class).__module__)
    models = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    }
    parts = ("pretrainedmodel", "pretrainedbartmodel", "wrapper", "encoder", "decoder", "stack")
    stock = {name for name in models if not name.lower().endswith(parts)}
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES"):
            named = mapping.get(family.model_type, ())
            stock |= models & {*([named] if isinstance(named, str) else named)}
    assert set(family.architectures) == stock
    targets = {target.split(".")[1] for name, target in family.auto_map.items() if name != "AutoConfig"}
    assert targets == {lsg_class.__name__ for lsg_class in family.architectures.values()}


@pytest.mark.made_families
def test_every_head_runs_and_trains(load, family):
    for name in heads(family):
        model = load(families.auto_class(name)).train()
        assert f"{family.module}.{type(model).__name__}" == family.auto_map[name]
        assert type(model).config_class.__name__ == family.config_class.__name__
        outputs = [value for value in run_head(name, model).values() if torch.is_tensor(value)]
        sum(output.square().mean() for output in outputs).backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        # The last two are in no path of MarkupLM and ESM.
        may = ("pooler", "position", "encoder_attn", "xpath_unitseq2_embeddings", "contact_head")
        assert all(any(part in n for part in may) for n in unused), (name, unused)


@pytest.mark.made_families
def test_gradients_reach_the_global_tokens(load):
    model = load(num_global_tokens=3)
    model(ids_of(model, 1, 30)).last_hidden_state.square().mean().backward()
    (gradient,) = [p.grad for n, p in model.named_parameters() if "global_embeddings" in n]
    assert gradient[:3].ne(0).any(dim=1).all() and not gradient[3:].any()


@pytest.mark.made_families
def test_gradient_checkpointing(converted, family):
    if not family.base_class.supports_gradient_checkpointing:
        pytest.skip("the stock model has no gradient checkpointing")
    head = families.auto_class(family.auto_class(list(family.architectures.values())[1]))
    for auto_class, via_config in ((AutoModel, False), (AutoModel, True), (head, True)):
        gradients = []
        for checkpointing in (False, True):
            config = AutoConfig.from_pretrained(converted, trust_remote_code=True, **SMALL)
            if checkpointing and via_config:
                config.gradient_checkpointing = True
            torch.manual_seed(0)
            model = auto_class.from_pretrained(converted, trust_remote_code=True, config=config)
            if checkpointing and not via_config:
                model.gradient_checkpointing_enable()
            layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and m.gradient_checkpointing]
            assert len(layers) >= (model.config.num_hidden_layers if checkpointing else 0)
            assert bool(layers) is checkpointing
            model = without_dropout(reader(model) if auto_class is AutoModel else model).train()
            output = model(ids_of(model, 2, 30))[0] if auto_class is AutoModel else run_head("", model)[0]
            output.square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            close(gradients[1][name], gradient)


# Saving and loading


@pytest.mark.few_families
@pytest.mark.made_families
def test_save_and_load(load, family, golden, converted, tmp_path):
    for name in heads(family)[:: 4 if golden.name in LIKE else 1]:
        auto_class = families.auto_class(name)
        model = load(auto_class, sparsity_type="stride")
        model.save_pretrained(tmp_path / name)
        assert {p.name for p in converted.glob("*.py")} == {p.name for p in (tmp_path / name).glob("*.py")}
        again = auto_class.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert again.config.sparsity_type == "stride" and again.config.block_size == 4
        assert again.config.auto_map == family.auto_map
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        close(run_head(name, again.eval())[0], run_head(name, model)[0])


def test_every_lsg_field_can_be_overridden(converted):
    changes = {
        "num_global_tokens": 16, "pool_with_global": False, "block_size": 64, "sparse_block_size": 32,
        "sparsity_factor": 4, "sparsity_type": "bos_pooling", "lsh_num_pre_rounds": 2, "lsh_seed": 3, "adaptive": False,
    }  # fmt: skip
    model = AutoModel.from_pretrained(converted, trust_remote_code=True, **changes)
    assert {name: getattr(model.config, name) for name in changes} == changes
    assert AutoModel.from_pretrained(converted, trust_remote_code=True, mask_first_token=True).config.mask_first_token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_type": "best"}, "sparsity_type: got 'best'; allowed is one of none, norm"),
        ({"num_global_tokens": 513}, "num_global_tokens: got 513; allowed is 0 to 512"),
        ({"num_global_tokens": -1}, "num_global_tokens: got -1; allowed is 0 to 512"),
        ({"block_size": 0}, "block_size: got 0; allowed is at least 1"),
        ({"block_size": 10, "sparsity_factor": 4}, "block_size: got 10; allowed is a multiple of sparsity_factor, 4"),
        ({"sparsity_factor": 256}, "sparsity_factor: got 256; allowed is 0 to block_size, 128"),
        ({"sparse_block_size": -1}, "sparse_block_size: got -1; allowed is at least 0"),
        ({"sparse_block_size": 48}, "sparse_block_size: got 48; allowed is 32 or 64, nearest to it"),
        ({"lsh_num_pre_rounds": -1}, "lsh_num_pre_rounds: got -1"),
        (
            {"mask_first_token": True, "pool_with_global": False},
            "mask_first_token: got True; allowed is True only with",
        ),
        ({"block_size": "128"}, "Field 'block_size' expected int, got str"),
        ({"adaptive": 3}, "Field 'adaptive' expected bool, got int"),
    ],
    ids=str,
)
def test_a_field_that_is_not_allowed_is_an_error(converted, family, changes, message):
    with pytest.raises(Exception, match=message):
        AutoModel.from_pretrained(converted, trust_remote_code=True, **changes)
    content = json.loads((converted / "config.json").read_text())
    config_class = type(AutoConfig.from_pretrained(converted, trust_remote_code=True))
    with pytest.raises(Exception, match=message):
        config_class(**{**content, **changes})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_global_tokens", 600, "num_global_tokens: got 600; allowed is 0 to 512"),
        ("block_size", 5, "block_size: got 5; allowed is a multiple of sparsity_factor, 2"),
        ("sparsity_type", "best", "sparsity_type: got 'best'"),
        ("is_decoder", True, "is_decoder: got True; allowed is False"),
    ],
)
def test_a_field_that_is_set_is_checked_too(load, family, converted, field, value, message):
    """When a model is built of the configuration, and when a model that has it reads the next text."""
    if field == "is_decoder" and (family.config_class.has_causal_form or family.config_class.is_encoder_decoder):
        pytest.skip("the family has a causal form, or a decoder")
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True)
    setattr(config, field, value)
    for auto_class in (AutoModel, families.auto_class(heads(family)[-1])):
        with pytest.raises(Exception, match=message):
            auto_class.from_pretrained(converted, trust_remote_code=True, config=config)
    model = load()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        model(ids_of(model, 1, 30))


def test_no_encoder_decoder_of_other_configurations(converted, golden):
    """Which would be saved, and come back, as stock models."""
    if golden.name != "bert":
        pytest.skip("one family shows it")
    encoder = AutoModel.from_pretrained(converted, trust_remote_code=True)
    decoder = transformers.BertLMHeadModel.from_pretrained(golden.source, is_decoder=True, add_cross_attention=True)
    with pytest.raises(
        ValueError,
        match=r"^attn_implementation: got the fields of an LSG model for a stock one; .* LSGEncoderDecoderModel",
    ):
        transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)


@pytest.mark.made_families
def test_tied_weights_stay_tied(load, family):
    for name in heads(family):
        model = load(families.auto_class(name))
        output = model.get_output_embeddings()
        if output is not None and name != "AutoModel":
            tied = output.weight is model.get_input_embeddings().weight
            assert tied or (model.config.model_type == "rembert" and not model.config.tie_word_embeddings)
            if model.config.model_type == "esm":  # whose stock class leaves the bias as it is
                continue
            model.resize_token_embeddings(model.config.vocab_size + 3)
            assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size
            assert run_head(name, model)[0].isfinite().all()


@pytest.mark.made_families
def test_a_new_model_has_finite_weights(family, golden):
    """Made from a configuration alone, in memory and on the meta device."""
    content = json.loads((golden.source / "config.json").read_text())
    for lsg_class in family.architectures.values():
        config = family.config_class.from_dict({**content, **SMALL})
        model = lsg_class(config)
        assert all(p.isfinite().all() for p in model.parameters())
        tables = [p for n, p in model.named_parameters() if "global_embeddings" in n]
        assert len(tables) == (0 if getattr(model.config, "is_decoder", False) else 1)
        names = "init_std", "initializer_factor", "initializer_range"
        spread = next(getattr(config, name) for name in names if hasattr(config, name))
        assert all(table.shape[0] == 512 and 0.5 < table.std() / spread < 2 for table in tables)
        with torch.device("meta"):
            assert lsg_class(copy.deepcopy(config)).device.type == "meta"


# Precision, compilation


@pytest.mark.few_families
@pytest.mark.made_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_half_precision_is_finite(load, dtype, kind):
    model = load(dtype=dtype, sparsity_type=kind).train()
    ids = ids_of(model, 3, 30)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2] = 0
    output = model(ids, attention_mask=mask).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.newest
@pytest.mark.few_families("bert")
def test_compiles_as_one_graph(load):
    model = load()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tokens in (6, 30):
        ids = ids_of(model, 2, tokens)
        close(compiled(ids, torch.ones_like(ids)).last_hidden_state, states(model, ids), atol=5e-5)
    torch._dynamo.reset()


@pytest.mark.few_families
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_autocast_is_finite(load, kind):
    model = load(sparsity_type=kind).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids_of(model, 2, 30)).last_hidden_state
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_numbers_of_global_tokens(load):
    """Each number gives a text of its length; more tokens see more."""
    results = []
    for count in (0, 1, 7, 512):
        model = load(num_global_tokens=count)
        for tokens in (1, 8, 9, 30):
            output = states(model, ids_of(model, 2, tokens))
            assert output.shape[:2] == (2, tokens) and output.isfinite().all()
        results.append(output)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(results))


@pytest.mark.made_families
def test_stock_and_lsg_models_live_in_one_process(load, golden, family):
    stock_type = stock_class(family.base_class)
    ids = torch.arange(5, 65)[None]
    before = states(reader(stock_type.from_pretrained(golden.source).eval()), ids)
    lsg = states(load(), ids)
    assert torch.equal(states(reader(stock_type.from_pretrained(golden.source).eval()), ids), before)
    assert not torch.allclose(lsg, before, atol=1e-3)


@pytest.mark.made_families
def test_weights_on_disk(converted, golden):
    """What did not change is the source's, bit by bit, by the names that the source has."""
    source, written = load_file(golden.source / "model.safetensors"), load_file(converted / "model.safetensors")
    if golden.name == "esm":  # whose stock class saves by old names
        source = transformers.EsmForMaskedLM.from_pretrained(golden.source).state_dict()
        source = {name: source[name] for name in source if name in written}  # one of those that are tied
        assert len(source) == len(written) - 1
    changed = {name for name in source if written[name].shape != source[name].shape}
    assert all("position" in name for name in changed)
    added = {"global_embeddings", "embed_positions"} if golden.name == "marian" else {"global_embeddings"}
    assert {name.split(".")[-2] for name in written.keys() - source.keys()} == added
    for name in source.keys() - changed:
        assert source[name].numpy().tobytes() == written[name].numpy().tobytes()
