"""One battery over every family: what a converted model does, loaded from disk as a user loads it."""

import copy
import importlib
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

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


def test_lengths(load):
    model = load()
    for tokens in (1, 2, 7, 8, 9, 11, 12, 13, 30, LIMIT):
        output = states(model, ids_of(model, 2, tokens))
        assert output.shape == (2, tokens, model.config.hidden_size)
        assert output.isfinite().all()


@pytest.mark.parametrize("tokens", [0, LIMIT + 1])
def test_a_length_that_does_not_fit_is_an_error(load, tokens):
    model = load()
    with pytest.raises(ValueError, match=rf"input_ids: got a text of {tokens} tokens"):
        model(ids_of(model, 1, tokens))
    embeds = torch.zeros(1, tokens, model.get_input_embeddings().weight.shape[1])
    with pytest.raises(ValueError, match=rf"got a text of {tokens} tokens"):
        model(inputs_embeds=embeds)


def test_without_adaptive_a_length_must_be_whole_blocks(load):
    model, adaptive = load(adaptive=False), load()
    for tokens in (1, 7, 8, 12, 16):
        ids = ids_of(model, 1, tokens)
        assert torch.equal(states(model, ids), states(adaptive, ids))
    with pytest.raises(ValueError, match=r"adaptive=False it must be a multiple of block_size, 4"):
        model(ids_of(model, 1, 9))


# Masks


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_on_the_right_changes_nothing(load, kind):
    model = load(dtype=torch.float64, sparsity_type=kind)
    ids = ids_of(model, 2, 61)
    for tokens in (1, 7, 8, 9, 30, 60):
        mask = torch.ones_like(ids)
        mask[0, tokens:] = 0
        close(states(model, ids, mask)[:1, :tokens], states(model, ids[:1, :tokens]), atol=1e-10)
        for other in (mask.bool(), mask.float(), mask.bool().int()):
            assert torch.equal(states(model, ids, other), states(model, ids, mask))


@pytest.mark.parametrize("kernel", KERNELS)
def test_left_padding_and_rows_of_padding_alone(load, kernel):
    model = load(attn_implementation=kernel).train()
    ids = ids_of(model, 4, 30)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2] = 0
    output = model(ids, mask).last_hidden_state
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    full = states(model, ids, mask)
    for row in (0, 1, 3):
        close(full[row], states(model, ids[row : row + 1], mask[row : row + 1])[0])


def test_left_padding_hides_what_it_covers(load):
    model = load()
    ids = ids_of(model, 1, 30)
    mask = torch.ones_like(ids)
    mask[:, :13] = 0
    other = torch.where(mask.bool(), ids, ids.flip(1))
    close(states(model, other, mask)[:, 13:], states(model, ids, mask)[:, 13:])


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_to_whole_blocks_by_hand_equals_ours(load, kind):
    model = load(dtype=torch.float64, sparsity_type=kind)
    ids = ids_of(model, 2, 32)
    mask = torch.ones_like(ids)
    mask[:, 29:] = 0
    close(states(model, ids, mask)[:, :29], states(model, ids[:, :29]), atol=1e-10)


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
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.in_features > 16]
    hooks = [layer.register_forward_hook(lambda _, args, __: seen.add(args[0].shape[:-1].numel())) for layer in layers]
    packed = model(ids, mask, output_hidden_states=True)
    (packed.last_hidden_state * weight * mask[:, :, None]).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert max(seen) == sum(max(g + length, 1) for length in tokens)
    for hook in hooks:
        hook.remove()
    for row, length in enumerate(tokens):
        if length:
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length], output_hidden_states=True)
            (alone.last_hidden_state * (weight * mask[:, :, None])[row, :length]).sum().backward()
            for one, whole in zip(alone.hidden_states, packed.hidden_states, strict=True):
                assert whole.shape == (5, 30, one.shape[-1])
                close(whole[row, :length], one[0], atol=1e-10)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        if grad is not None:
            close(parameter.grad, grad, atol=1e-8)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(load, kind):
    model = load(dtype=torch.float64, sparsity_type=kind)
    ids = ids_of(model, 3, 61)
    for row, expected in enumerate(states(model, ids)):
        close(states(model, ids[row : row + 1])[0], expected, atol=1e-10)


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
            model(ids, torch.ones(shape))


def test_inputs_are_not_written_to(load):
    model = load(mask_first_token=True)
    ids, mask = ids_of(model, 2, 30), torch.ones(2, 30, dtype=torch.bool)
    mask[0, 20:] = False
    before = ids.clone(), mask.clone()
    states(model, ids, mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


# Other inputs


def test_inputs_embeds_equal_ids(load):
    model = load()
    ids = ids_of(model, 2, 30)
    embeds = model.get_input_embeddings()(ids)
    if getattr(model, "scales_outside", False):
        embeds = embeds * model.embed_scale
    assert torch.equal(states(model, inputs_embeds=embeds), states(model, ids))


def test_token_types_matter(load):
    model = load()
    if not getattr(model.config, "type_vocab_size", 0) > 1:
        pytest.skip("the family has one token type")
    ids = ids_of(model, 1, 30)
    types = torch.zeros_like(ids)
    assert torch.equal(states(model, ids, token_type_ids=types), states(model, ids))
    types[:, 20:] = 1
    assert not torch.allclose(states(model, ids, token_type_ids=types), states(model, ids), atol=1e-3)


def test_arguments_by_position_and_the_stock_signature(load):
    from inspect import signature

    model = load()
    assert str(signature(model.forward)) == str(signature(stock_class(type(model)).forward.__get__(model)))
    ids, mask = ids_of(model, 1, 30), torch.ones(1, 30)
    mask[:, 20:] = 0
    assert torch.equal(model(ids, mask)[0], model(input_ids=ids, attention_mask=mask)[0])


# Short texts are those of the plain model


@pytest.mark.parametrize("kernel", KERNELS)
def test_short_texts_without_globals_equal_the_stock_model(load, golden, family, kernel):
    options = {"attn_implementation": kernel, "dtype": torch.float64}
    model = load(num_global_tokens=0, **options)
    stock = stock_class(family.base_class).from_pretrained(golden.source, **options)
    stock = reader(stock.eval())
    for tokens in (1, 5, 8):
        ids = ids_of(model, 2, tokens)
        mask = torch.ones_like(ids)
        mask[0, (tokens + 1) // 2 :] = 0
        expected, actual = (m(ids, mask, output_hidden_states=True) for m in (stock, model))
        for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
            close(a[mask.bool()], b[mask.bool()], atol=1e-10)


# Outputs


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


def test_attentions(load):
    model = load(attn_implementation="eager", num_global_tokens=3)
    config, width = model.config, 3 + 3 * 4 + 2 * 4
    # A text of 20 tokens has as many keys in its windows as there are tokens, the globals included.
    for tokens, keys in ((6, 6), (20, width), (30, width)):
        outputs = model(ids_of(model, 2, tokens), output_attentions=True)
        shape = (2, config.num_attention_heads, tokens, keys)
        assert [a.shape for a in outputs.attentions] == [shape] * config.num_hidden_layers
        shape = (2, config.num_attention_heads, 3, 3 + tokens)
        assert [a.shape for a in outputs.global_attentions] == [shape] * config.num_hidden_layers
        close(outputs.global_attentions[0].sum(-1), torch.ones(shape[:-1]))
    close(outputs.attentions[0].sum(-1), torch.ones(2, config.num_attention_heads, 30))


def test_what_a_kernel_cannot_give(load):
    model = load()
    # As Transformers' own models: the fused kernel has none to give.
    assert not model(ids_of(model, 1, 30), output_attentions=True).attentions
    with pytest.raises(ValueError, match=r"flex_attention"):
        load(attn_implementation="flex_attention")
    model.set_attn_implementation("eager")
    assert model(ids_of(model, 1, 30), output_attentions=True).attentions


def test_kernels_agree(load):
    eager, sdpa = (load(attn_implementation=kernel) for kernel in KERNELS)
    ids = ids_of(eager, 2, 61)
    close(states(sdpa, ids), states(eager, ids), atol=5e-5)


# Heads


def run_head(name, model, tokens=30):
    ids = ids_of(model, 2, tokens)
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


def test_every_head_of_transformers_is_there(family):
    module = importlib.import_module(stock_class(family.base_class).__module__)
    stock = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.lower().endswith(("pretrainedmodel", "pretrainedbartmodel", "wrapper", "encoder", "decoder"))
    }
    assert set(family.architectures) == stock
    targets = {target.split(".")[1] for name, target in family.auto_map.items() if name != "AutoConfig"}
    assert targets == {lsg_class.__name__ for lsg_class in family.architectures.values()}


def test_every_head_runs_and_trains(load, family):
    for name in heads(family):
        model = load(families.auto_class(name)).train()
        assert f"{family.module}.{type(model).__name__}" == family.auto_map[name]
        assert type(model).config_class.__name__ == family.config_class.__name__
        outputs = [value for value in run_head(name, model).values() if torch.is_tensor(value)]
        sum(output.square().mean() for output in outputs).backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert all("pooler" in n or "position" in n or "encoder_attn" in n for n in unused), (name, unused)


def test_gradients_reach_the_global_tokens(load):
    model = load(num_global_tokens=3)
    model(ids_of(model, 1, 30)).last_hidden_state.square().mean().backward()
    (gradient,) = [p.grad for n, p in model.named_parameters() if "global_embeddings" in n]
    assert gradient[:3].ne(0).any(dim=1).all() and not gradient[3:].any()


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


def test_save_and_load(load, family, converted, tmp_path):
    for name in heads(family):
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
        ({"sparse_block_size": 48}, "sparse_block_size: got 48; allowed is with 'norm' a multiple of"),
        ({"lsh_num_pre_rounds": -1}, "lsh_num_pre_rounds: got -1"),
        (
            {"mask_first_token": True, "pool_with_global": False},
            "mask_first_token: got True; allowed is True only with",
        ),
        ({"is_decoder": True}, "is_decoder: got True; allowed is False"),
        ({"block_size": "128"}, "Field 'block_size' expected int, got str"),
        ({"adaptive": 3}, "Field 'adaptive' expected bool, got int"),
    ],
    ids=str,
)
def test_a_field_that_is_not_allowed_is_an_error(converted, family, changes, message):
    if "is_decoder" in changes and (
        family.config_class.may_be_decoder or "is_decoder" not in vars(family.config_class())
    ):
        pytest.skip("the family has no causal form")
    with pytest.raises(Exception, match=message):
        AutoModel.from_pretrained(converted, trust_remote_code=True, **changes)
    content = json.loads((converted / "config.json").read_text())
    config_class = type(AutoConfig.from_pretrained(converted, trust_remote_code=True))
    with pytest.raises(Exception, match=message):
        config_class(**{**content, **changes})


def test_tied_weights_stay_tied(load, family):
    for name in heads(family):
        model = load(families.auto_class(name))
        output = model.get_output_embeddings()
        if output is not None and name != "AutoModel":
            assert output.weight is model.get_input_embeddings().weight
            model.resize_token_embeddings(model.config.vocab_size + 3)
            assert output.weight.shape[0] == model.config.vocab_size
            assert run_head(name, model)[0].isfinite().all()


def test_a_new_model_has_finite_weights(family, golden):
    """Made from a configuration alone, in memory and on the meta device."""
    content = json.loads((golden.source / "config.json").read_text())
    for lsg_class in family.architectures.values():
        config = family.config_class.from_dict({**content, **SMALL})
        model = lsg_class(config)
        assert all(p.isfinite().all() for p in model.parameters())
        tables = [p for n, p in model.named_parameters() if "global_embeddings" in n]
        assert len(tables) == (0 if getattr(model.config, "is_decoder", False) else 1)
        spread = getattr(config, "init_std", None) or config.initializer_range
        assert all(table.shape[0] == 512 and 0.5 < table.std() / spread < 2 for table in tables)
        with torch.device("meta"):
            assert lsg_class(copy.deepcopy(config)).device.type == "meta"


# Precision, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_half_precision_is_finite(load, dtype, kind):
    model = load(dtype=dtype, sparsity_type=kind).train()
    ids = ids_of(model, 3, 30)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2] = 0
    output = model(ids, mask).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.newest
def test_compiles_as_one_graph(load):
    model = load()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tokens in (6, 30):
        ids = ids_of(model, 2, tokens)
        close(compiled(ids, torch.ones_like(ids)).last_hidden_state, states(model, ids), atol=5e-5)
    torch._dynamo.reset()


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


def test_stock_and_lsg_models_live_in_one_process(load, golden, family):
    stock_type = stock_class(family.base_class)
    ids = torch.arange(5, 65)[None]
    before = states(reader(stock_type.from_pretrained(golden.source).eval()), ids)
    lsg = states(load(), ids)
    assert torch.equal(states(reader(stock_type.from_pretrained(golden.source).eval()), ids), before)
    assert not torch.allclose(lsg, before, atol=1e-3)


def test_weights_on_disk(converted, golden):
    """What did not change is the source's, bit by bit, by the names that the source has."""
    source, written = load_file(golden.source / "model.safetensors"), load_file(converted / "model.safetensors")
    changed = {name for name in source if written[name].shape != source[name].shape}
    assert all("position" in name for name in changed)
    assert {name.split(".")[-2] for name in written.keys() - source.keys()} == {"global_embeddings"}
    for name in source.keys() - changed:
        assert source[name].numpy().tobytes() == written[name].numpy().tobytes()
