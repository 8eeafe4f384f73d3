"""What is particular of a family, beside what the battery holds for all of them."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import GOLDEN, Made, run_command
from huggingface_hub.errors import StrictDataclassError
from made import LIKE
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EsmForMaskedLM,
    RemBertForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.deberta import modeling_deberta

from lsg_converter import ConversionOptions, convert, families
from lsg_converter.modeling.lsg_bias import distance_bias
from lsg_converter.options import SourceError


# Where something is particular.
EXACT = [
    *("esm", "layoutlm", "markuplm", "marian", "megatron_bert", "mt5", "rembert", "splinter", "t5"),
    *("umt5", "xlm_roberta_xl", "xmod"),
]
T5 = ["t5", *[pytest.param(name, marks=pytest.mark.full) for name in ("mt5", "umt5")]]
SMALL = {"block_size": 4, "sparse_block_size": 4, "num_global_tokens": 2}


def source_of(name, tmp_path, **changes):
    """The source of a family, with changes to its configuration."""
    source = Made(name, tmp_path).source
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **changes}))
    return source


def lsg_of(name, tmp_path, *flags, changes=None, **fields):
    source, target = Made(name, tmp_path, **(changes or {})).source, tmp_path / "lsg"
    assert run_command(source, target, "--max_sequence_length", "1000", "--quiet", *flags) == 0
    model = AutoModel.from_pretrained(target, trust_remote_code=True, dtype=torch.float64, **{**SMALL, **fields})
    return model.eval(), AutoModel.from_pretrained(source, dtype=torch.float64).eval()


def readers_of(*args, **fields):
    """The same, of what reads a text: the base model, or its encoder."""
    return [m.get_encoder() if m.config.is_encoder_decoder else m for m in lsg_of(*args, **fields)]


def ids_of(rows, tokens):
    return torch.randint(5, 120, (rows, tokens), generator=torch.Generator().manual_seed(0))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_model_type_is_that_of_transformers():
    assert "m2m_100" in families.model_types() and "data2vec-text" in families.model_types()
    assert len(families.model_types()) == len(list(families.MODELING.glob("modeling_lsg_*.py")))


@pytest.mark.newest
def test_what_is_refused_is_a_family():
    assert set(families.REFUSED) <= {*CONFIG_MAPPING_NAMES} - {*families.model_types()}


def test_a_refusal_says_why(tmp_path):
    shutil.copytree(GOLDEN / "bert" / "source", tmp_path / "source")
    content = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**content, "model_type": "roformer"}))
    with pytest.raises(SourceError, match=r"'roformer' cannot be converted, for its rotary .*; give a model of one of"):
        convert(ConversionOptions(initial_model=str(tmp_path / "source"), model_name=str(tmp_path / "lsg")))


@pytest.mark.parametrize("name", ["m2m_100", *[pytest.param(name, marks=pytest.mark.full) for name in EXACT]])
def test_exact_conversions_are_verified(name, tmp_path):
    """In half precision, what the source gives, as the verification found in float64."""
    source, target = Made(name, tmp_path).source, tmp_path / "lsg"
    flags = ["--max_sequence_length", "1000", "--quiet", "--exact", "--dtype", "bfloat16"]
    assert run_command(source, target, *flags) == 0
    report = json.loads((target / "lsg_conversion.json").read_text())
    assert any("tokens give what the source gives" in check["name"] for check in report["checks"])


def gradients(model, output):
    """By name, of the weights that the output depends on."""
    output.square().sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}


def normed(norm, states):
    return torch.nn.functional.layer_norm(states, states.shape[-1:], norm.weight, norm.bias, norm.variance_epsilon)


C2P, P2C, TABLE = {"pos_att_type": ["c2p"]}, {"pos_att_type": "P2C"}, {"position_biased_input": True}
RELATIVE = [
    ("mpnet", {}),
    ("deberta", {}),
    ("deberta", C2P | TABLE | {"type_vocab_size": 2}),
    ("deberta", P2C | {"max_relative_positions": 100}),
    ("deberta", {"relative_attention": False} | TABLE),
    ("deberta_v2", {}),
    ("deberta_v2", C2P | TABLE | {"share_att_key": False, "norm_rel_ebd": "none", "conv_kernel_size": 0}),
    ("deberta_v2", P2C | {"share_att_key": False, "position_buckets": -1}),
    ("deberta_v2", {"position_buckets": 7, "embedding_size": 8, "max_relative_positions": 60}),
    ("t5", {}),
    pytest.param("mt5", {}, marks=pytest.mark.full),
    pytest.param("umt5", {}, marks=pytest.mark.full),
]


@pytest.mark.parametrize("kernel", ["eager", "cpu", "portable"])
@pytest.mark.parametrize(("name", "changes"), RELATIVE, ids=str)
def test_relative_positions_are_the_source_s(name, changes, kernel, tmp_path, monkeypatch):
    """Without global tokens, up to two blocks, for padded rows; the gradients too, of the biases among them."""
    fields = {"num_global_tokens": 0, "block_size": 200, "sparse_block_size": 200, "attention_kernel": kernel}
    if kernel == "eager":
        fields |= {"attention_kernel": None, "attn_implementation": "eager"}
    model, stock = readers_of(name, tmp_path, "--no_verify", changes=changes, **fields)
    exact = name not in ("t5", "mt5", "umt5") or stock._supports_sdpa  # Older T5 computes its softmax in float32.
    # Which the stock one computes in float32.
    monkeypatch.setattr(modeling_deberta.DebertaLayerNorm, "forward", normed)
    ids = ids_of(2, 350)
    mask = torch.ones_like(ids)
    ids[1, 200:], mask[1, 200:] = model.config.pad_token_id, 0
    actual, expected = (
        m(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None] for m in (model, stock)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 if exact else 1e-5)
    actual_grads, expected_grads = gradients(model, actual), gradients(stock, expected)
    assert any("rel" in key for key in expected_grads) or changes.get("relative_attention") is False
    for key, grad in expected_grads.items():
        atol = 1e-8 if exact else 1e-5 * float(grad.abs().max())
        torch.testing.assert_close(actual_grads[key][: len(grad)], grad, rtol=1e-8, atol=atol)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mpnet", {}),
        ("t5", {}),
        *[pytest.param(name, {}, marks=pytest.mark.full) for name in ("mt5", "umt5", "deberta")],
        ("deberta_v2", {"position_biased_input": False}),
    ],
    ids=str,
)
def test_relative_positions_in_long_texts(name, changes, tmp_path):
    """Alike in every kernel, on the left of padding and on its right; and a head hands on what its model reads."""
    model, _ = readers_of(name, tmp_path, "--no_verify", changes=changes, attn_implementation="eager")
    ids = ids_of(1, 333)
    expected = model(input_ids=ids).last_hidden_state
    padding = torch.full((1, 7), model.config.pad_token_id)
    model.set_attn_implementation("sdpa")
    for model.config.attention_kernel in ("cpu", "portable"):
        close(model(input_ids=ids).last_hidden_state, expected)
        for parts, kept in (((padding, ids), slice(7, None)), ((ids, padding), slice(333))):
            padded = torch.cat(parts, dim=1)
            states = model(input_ids=padded, attention_mask=(padded != model.config.pad_token_id).long())[0]
            close(states[:, kept], expected)


# In Transformers 5.10 the stock class cannot load the other head.
@pytest.mark.parametrize("legacy", [True, pytest.param(False, marks=[pytest.mark.full, pytest.mark.newest])])
@pytest.mark.parametrize("name", ["deberta", pytest.param("deberta_v2", marks=pytest.mark.full)])
def test_both_masked_heads_of_deberta(name, legacy, tmp_path, monkeypatch):
    """Their weights travel, and they say what the source's says."""
    monkeypatch.setattr(modeling_deberta.DebertaLayerNorm, "forward", normed)
    source, target = Made(name, tmp_path, legacy=legacy).source, tmp_path / "lsg"
    assert run_command(source, target, "--max_sequence_length", "1000", "--quiet", "--exact", "--run_test") == 0
    model, stock = (
        AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float64).eval()
        for path in (target, source)
    )
    ids = ids_of(2, 300)
    close(model(ids).logits, stock(ids).logits)
    assert model.config.max_relative_positions == 512 and model.config.max_position_embeddings == 1000


@pytest.mark.parametrize(
    ("name", "field", "why"),
    [
        ("deberta", "talking_head", "LSG does not mix"),
        ("megatron_bert", "add_cross_attention", "that of Transformers' megatron-bert cannot read"),
    ],
)
def test_a_field_that_lsg_does_not_have_is_refused(name, field, why, tmp_path, capsys):
    source = source_of(name, tmp_path, **{field: True})
    assert run_command(source, tmp_path / "lsg", "--max_sequence_length", "1000") == 3
    assert f"{field}: got True; allowed is False: {why}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["megatron_bert", "mpnet", "t5"])
def test_heads_hand_on_what_their_model_reads(name, tmp_path):
    lsg_of(name, tmp_path, "--no_verify")
    head = AutoModelForTokenClassification.from_pretrained(tmp_path / "lsg", trust_remote_code=True, **SMALL).eval()
    ids, promoted = ids_of(1, 333), torch.arange(333)[None] == 5
    assert not torch.equal(head(ids).logits, head(ids, global_attention_mask=promoted).logits)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "xmod" else pytest.mark.full) for name in LIKE]
)
def test_decoders_are_verified(name, tmp_path):
    """That nothing leaks, and steps give the same; in each family that has a causal form."""
    family = families.family(next(kind for kind in families.model_types() if kind.replace("-", "_") == name))
    names = [name for name, lsg_class in family.architectures.items() if family.is_causal(lsg_class)]
    assert len(names) == family.config_class.has_causal_form
    for architecture in names:
        flags = ["--max_sequence_length", "1000", "--quiet", "--architecture", architecture]
        assert run_command(Made(name, tmp_path).source, tmp_path / "lsg", *flags) == 0
        report = json.loads((tmp_path / "lsg" / "lsg_conversion.json").read_text())
        assert any("in steps and at once" in check["name"] for check in report["checks"])


@pytest.mark.parametrize("name", ["megatron_bert", pytest.param("rembert", marks=pytest.mark.full)])
def test_a_decoder_runs_again_in_training(name, tmp_path):
    """By gradient checkpointing: with the gradients of one that does not, and no cache."""
    options = {"architectures": None, "is_decoder": True, "attention_probs_dropout_prob": 0.0}
    source, target = source_of(name, tmp_path, **options, hidden_dropout_prob=0.0), tmp_path / "lsg"
    prefix = "MegatronBert" if name == "megatron_bert" else "RemBert"
    flags = ["--architecture", f"{prefix}ForCausalLM", "--quiet", "--no_verify"]
    assert run_command(source, target, "--max_sequence_length", "1000", *flags) == 0
    model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True, dtype=torch.float64, **SMALL).train()
    ids = ids_of(2, 30)
    expected = gradients(model, model(ids).logits)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    outputs = model(ids)
    actual = gradients(model, outputs.logits)
    assert not outputs.past_key_values and actual.keys() == expected.keys()
    assert all(torch.equal(grad, expected[key]) for key, grad in actual.items())


@pytest.mark.newest  # In Transformers 5.10 the stock decoder looks ahead.
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.no_grad()
def test_cross_attention_of_rembert_is_the_stock_one(kernel, tmp_path):
    """Its class is that of the self-attention. Also in steps."""
    source, target = source_of("rembert", tmp_path), tmp_path / "lsg"
    flags = ["--max_sequence_length", "1000", "--architecture", "RemBertForCausalLM", "--quiet", "--no_verify"]
    assert run_command(source, target, *flags) == 0
    fields = {"is_decoder": True, "add_cross_attention": True, "dtype": torch.float64}
    stock = RemBertForCausalLM.from_pretrained(source, **fields).eval()
    fields |= {"num_global_tokens": 0, "trust_remote_code": True, "attn_implementation": kernel}
    model = AutoModelForCausalLM.from_pretrained(target, **fields).eval()
    weights = {name: x for name, x in stock.state_dict().items() if "crossattention" in name}
    assert weights and not model.load_state_dict(weights, strict=False).unexpected_keys
    ids, mask, states = ids_of(2, 30), torch.ones(2, 17), torch.randn(2, 17, 16, dtype=torch.float64)
    mask[0, 9:] = 0
    for given in (mask, None):
        read = {"encoder_hidden_states": states, "encoder_attention_mask": given}
        outputs, expected = (each(ids, **read, output_attentions=True) for each in (model, stock))
        close(outputs.logits, expected.logits)
        close(outputs.cross_attentions, expected.cross_attentions)
        start = model(ids[:, :20], **read, use_cache=True)
        close(model(ids[:, 20:], **read, past_key_values=start.past_key_values).logits, expected.logits[:, 20:])


# The first rows of the table of global tokens


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("ernie", ["token_type", "task_type"]),
        ("layoutlm", ["token_type", *2 * ["x_position", "y_position"], "h_position", "w_position"]),
        ("xlm_roberta_xl", []),
    ],
)
def test_a_global_token_is_a_first_token(name, types, tmp_path):
    """It carries what the family adds to a word and a position, and its LayerNorm, where there is one."""
    model, stock = lsg_of(name, tmp_path, "--no_verify")
    embeddings = stock.embeddings.state_dict()
    first = model.special_positions(model.config)
    row = embeddings["position_embeddings.weight"][first] + embeddings["word_embeddings.weight"][0 if first else 2]
    row = row + sum(embeddings[f"{kind}_embeddings.weight"][0] for kind in types)
    torch.testing.assert_close(model.embeddings.global_embeddings.weight[0], row, rtol=0, atol=1e-6)
    inputs = {"bbox": torch.zeros(1, 3, 4, dtype=torch.int64)} if name == "layoutlm" else {}
    states = model.embeddings(input_ids=ids_of(1, 3), **inputs)
    table = model.embeddings.global_embeddings.weight[:2]
    close(states[0, :2], getattr(model.embeddings, "LayerNorm", torch.nn.Identity())(table))


# ESM: positions and masked tokens


@pytest.mark.parametrize("kind", ["absolute", "rotary"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.full
def test_learned_and_rotary_positions(kind, normed, tmp_path):
    """ESM-1b and ESM-2. Tokens that are masked are counted among the text alone."""
    config = AutoConfig.from_pretrained(Made("esm", tmp_path).source)
    config.position_embedding_type, config.emb_layer_norm_before = kind, normed
    torch.manual_seed(0)
    stock = EsmForMaskedLM(config).double().eval()
    stock.save_pretrained(tmp_path / "stock")
    assert run_command(tmp_path / "stock", tmp_path / "lsg", "--max_sequence_length", "1000", "--quiet") == 0
    model = AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True, dtype=torch.float64, **SMALL).eval()
    table = model.global_embeddings.weight
    word = stock.esm.embeddings.word_embeddings.weight.mean(0)  # without a tokenizer
    row = word if kind == "rotary" else word + stock.esm.embeddings.position_embeddings.weight[2]
    torch.testing.assert_close(table[0], row, rtol=0, atol=1e-6)
    ids = ids_of(2, 45)
    ids[:, 3] = ids[0, 5] = config.mask_token_id
    mask = torch.ones_like(ids)
    mask[1, 20:], ids[1, 20:] = 0, config.pad_token_id
    whole = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model(ids[1:, :20]).last_hidden_state, whole[1:, :20], rtol=0, atol=1e-6)
    moved = torch.nn.functional.pad(ids[1:, :20], (7, 0), value=config.pad_token_id)
    left = model(moved, attention_mask=(moved != config.pad_token_id).long()).last_hidden_state
    torch.testing.assert_close(left[:, 7:], whole[1:, :20], rtol=0, atol=1e-6)
    model.config.num_global_tokens, model.config.full_attention_length = 0, 1000
    expected, actual = (each(ids, attention_mask=mask).last_hidden_state for each in (stock.esm, model))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-6)


# X-MOD: languages


def test_languages_by_row_and_by_token(tmp_path):
    model, stock = lsg_of("xmod", tmp_path)
    ids, mask = ids_of(3, 30), torch.ones(3, 30, dtype=torch.int64)
    mask[0, 20:] = 0
    languages = torch.tensor([0, 1, 1])
    by_row = model(ids, languages, mask).last_hidden_state
    close(model(ids, languages[:, None].expand(3, 30), mask).last_hidden_state, by_row)
    close(model(ids[1:], attention_mask=mask[1:]).last_hidden_state, by_row[1:])  # the default
    close(model(ids[:1, :20], languages[:1]).last_hidden_state, by_row[:1, :20])
    assert not torch.allclose(model(ids, 1 - languages, mask).last_hidden_state, by_row, atol=1e-3)
    with pytest.raises(ValueError, match=r"^lang_ids: got shape \(2,\); it must be \(3,\) or \(3, 30\)$"):
        model(ids, languages[:2])
    by_token = (torch.arange(8) > 3).long().expand(3, 8)
    model.config.num_global_tokens = 0
    close(*(each(ids[:, :8], by_token).last_hidden_state for each in (model, stock)))


@pytest.mark.full
def test_without_a_default_language(tmp_path):
    source = source_of("xmod", tmp_path, default_language=None)
    assert run_command(source, tmp_path / "lsg", "--max_sequence_length", "600", "--run_test", "--quiet") == 0
    model = AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True)
    with pytest.raises(ValueError, match="Input language unknown"):
        model(ids_of(1, 8))


# Encoder-decoders: positions that are computed, two vocabularies


def test_computed_positions_follow_the_padding_and_never_end(tmp_path):
    model, stock = lsg_of("m2m_100", tmp_path, "--exact", num_global_tokens=0, full_attention_length=1000)
    ids = ids_of(2, 700)
    ids[0, :100] = model.config.pad_token_id
    mask = (ids != model.config.pad_token_id).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, 100:105]}
    expected, actual = (each(**inputs) for each in (stock, model))
    close(actual.encoder_last_hidden_state[mask.bool()], expected.encoder_last_hidden_state[mask.bool()])
    close(actual.last_hidden_state, expected.last_hidden_state)
    model.set_attn_implementation("eager")
    model.config.full_attention_length = None
    model.config.num_global_tokens = 1
    model.config.pass_global_tokens_to_decoder = False
    alone = model(ids[:1, 100:], decoder_input_ids=ids[:1, 100:105]).encoder_last_hidden_state
    padded = model(ids[:1], attention_mask=mask[:1], decoder_input_ids=ids[:1, 100:105]).encoder_last_hidden_state
    close(padded[:, 100:], alone)


@pytest.mark.full
def test_words_of_two_languages(tmp_path):
    """Marian may have a vocabulary, and embeddings, for each."""
    config = AutoConfig.from_pretrained(Made("marian", tmp_path).source)
    config.share_encoder_decoder_embeddings, config.decoder_vocab_size, config.tie_word_embeddings = False, 90, False
    family = families.family("marian")
    torch.manual_seed(0)
    stock = families.stock_class(family.architectures["MarianMTModel"])(config).eval()
    stock.save_pretrained(tmp_path / "two")
    flags = ["--max_sequence_length", "300", "--quiet", "--run_test"]
    assert run_command(tmp_path / "two", tmp_path / "lsg", *flags) == 0
    model = AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True, num_global_tokens=0).eval()
    inputs = {"input_ids": ids_of(2, 40), "decoder_input_ids": ids_of(2, 5) % 90}
    torch.testing.assert_close(
        model(**inputs).last_hidden_state, stock.model(**inputs).last_hidden_state, rtol=0, atol=1e-5
    )
    written = load_file(tmp_path / "lsg" / "model.safetensors")
    assert written["model.encoder.embed_tokens.weight"].shape[0] == 120
    assert written["model.decoder.embed_tokens.weight"].shape[0] == 90
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "lsg", trust_remote_code=True)  # no stock one loads it
    assert torch.equal(decoder.lm_head.weight, stock.lm_head.weight) and decoder.config.vocab_size == 90


def test_heads_that_look_for_a_question_are_run_on_one(tmp_path):
    source = Made("splinter", tmp_path, vocab_size=30000, question_token_id=104).source
    flags = ["--max_sequence_length", "300", "--quiet", "--run_test"]
    assert run_command(source, tmp_path / "lsg", *flags) == 0
    report = json.loads((tmp_path / "lsg" / "lsg_conversion.json").read_text())
    names = {run["auto_class"] for run in report["heads"]}
    assert names == {"AutoModel", "AutoModelForPreTraining", "AutoModelForQuestionAnswering"}


# T5: no positions, one class of stacks, several parts


@pytest.mark.parametrize("reach", [20, 128])
@pytest.mark.parametrize("name", T5)
def test_the_bias_is_the_stock_one_at_every_distance(name, reach, tmp_path):
    source = source_of(name, tmp_path, relative_attention_max_distance=reach, relative_attention_num_buckets=32)
    config = AutoConfig.from_pretrained(source)
    family = families.family(name)
    attention = family.base_class(family.config_class(**config.to_dict())).encoder.block[0].layer[0].SelfAttention
    table = attention.distance_bias()
    distance = torch.arange(300)[:, None] - torch.arange(300)
    expected = attention.compute_bias(300, 300)[0]
    assert torch.equal(distance_bias(table, distance[None, None])[:, 0], expected)


@pytest.mark.parametrize("name", T5)
def test_the_decoder_is_the_stock_one(name, tmp_path):
    """And gives what it gives, by the encoder's states of a short text; the scale before the head included."""
    for tied in (True, False):  # T5's first version, and the second, which does not scale
        shutil.rmtree(tmp_path / "lsg", ignore_errors=True)
        source = source_of(name, tmp_path, tie_word_embeddings=tied)
        weights = load_file(source / "model.safetensors")
        if not tied:
            words = weights["shared.weight"]
            save_file({**weights, "lm_head.weight": words.flip(0)}, source / "model.safetensors", {"format": "pt"})
        assert run_command(source, tmp_path / "lsg", "--quiet", "--no_verify") == 0
        options = {"dtype": torch.float64, "attn_implementation": "eager"}
        stock = AutoModelForSeq2SeqLM.from_pretrained(source, **options).eval()
        model = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / "lsg", trust_remote_code=True, num_global_tokens=0, **options
        ).eval()
        assert type(model.decoder) is type(stock.decoder) and type(model.encoder) is not type(stock.encoder)
        inputs = {"input_ids": ids_of(2, 30), "decoder_input_ids": ids_of(2, 9)}
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)
        assert (model.lm_head.weight is model.shared.weight) is (stock.lm_head.weight is stock.shared.weight) is tied
        shutil.rmtree(source)


@pytest.mark.parametrize("name", T5)
def test_an_encoder_alone(name, tmp_path):
    """Of a whole model, or of a source that is one already. Heads that classify tokens have it too."""
    source, flags = source_of(name, tmp_path), ["--max_sequence_length", "1000", "--quiet"]
    prefix = name.upper()
    assert run_command(source, tmp_path / "lsg", *flags, "--architecture", f"{prefix}EncoderModel") == 0
    report = json.loads((tmp_path / "lsg" / "lsg_conversion.json").read_text())
    assert "the decoder: left out" in report["changed"] and not report["dropped_weights"]
    options = {"trust_remote_code": True, "dtype": torch.float64}
    model = AutoModelForTextEncoding.from_pretrained(tmp_path / "lsg", **options, **SMALL).eval()
    assert type(model).__name__ == f"LSG{prefix}EncoderModel" and not model.config.is_encoder_decoder
    ids = ids_of(1, 70)
    outputs = model(ids)
    assert outputs.keys() == {"last_hidden_state"}  # There is no decoder to pass global tokens on to.
    model.config.pool_with_global = False
    states = model(ids).last_hidden_state
    close(states[:, 1:], outputs.last_hidden_state[:, 1:])
    assert not torch.allclose(states[:, 0], outputs.last_hidden_state[:, 0])
    stock = getattr(transformers, f"{prefix}EncoderModel").from_pretrained(source, dtype=torch.float64)
    stock.save_pretrained(tmp_path / "encoder")
    for architecture in (f"{prefix}EncoderModel", f"{prefix}ForTokenClassification"):
        target = tmp_path / architecture
        assert run_command(tmp_path / "encoder", target, *flags, "--exact", "--architecture", architecture) == 0
        report = json.loads((target / "lsg_conversion.json").read_text())
        assert "1, 256, 257, 511, 512 tokens give what the source gives" in [c["name"] for c in report["checks"]]
        assert "the decoder: left out" not in report["changed"]
    model = AutoModelForTextEncoding.from_pretrained(target, **options).eval()
    torch.testing.assert_close(model(ids).last_hidden_state, stock.eval()(ids).last_hidden_state, rtol=0, atol=1e-4)


def test_a_new_head_of_t5_is_drawn(tmp_path):
    """Also by an older Transformers, whose stock class does it where it meets a module that has no weights itself."""
    lsg_of("t5", tmp_path, "--no_verify")
    for auto_class, head in (
        (AutoModelForSequenceClassification, "classification_head.dense"),
        (AutoModelForQuestionAnswering, "qa_outputs"),
        (AutoModelForTokenClassification, "classifier"),
    ):
        model = auto_class.from_pretrained(tmp_path / "lsg", trust_remote_code=True)
        part = model.get_submodule(head)
        assert 0.1 < part.weight.std() < 0.5 and not part.bias.any()


def test_t5_has_no_end_and_no_positions(tmp_path, capsys):
    source, target = source_of("t5", tmp_path), tmp_path / "lsg"
    for flags, message in (
        (["--position_init", "stretch"], "--position_init: got 'stretch'; t5 has relative positions: leave it out"),
        (["--max_sequence_length", "20000000"], "--max_sequence_length: got 20000000; give at most 16777216"),
    ):
        assert run_command(source, target, *flags) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    flags = ["--max_sequence_length", "300", "--dry_run", "--model_kwargs", "{'num_global_tokens': 4}"]
    assert run_command(source, target, *flags) == 0
    shown = capsys.readouterr().out
    for line in (
        "source: t5, relative positions",
        "LSGT5ForConditionalGeneration, 300 tokens",
        "positions: relative, as they are",
        "start alike",
    ):
        assert line in shown, line
    assert "warning" not in shown
    assert run_command(source, target, "--max_sequence_length", "300", "--quiet") == 0
    assert "its positions\nare relative, and as they were" in (target / "README.md").read_text()
    assert json.loads((target / "config.json").read_text())["n_positions"] == 300
    assert AutoTokenizer.from_pretrained(target).model_max_length == 300
    model = AutoModel.from_pretrained(target, trust_remote_code=True).eval()
    ids = ids_of(1, 900)
    assert model(input_ids=ids, decoder_input_ids=ids[:, :5]).last_hidden_state.isfinite().all()
    with pytest.raises(StrictDataclassError, match="position_step: got 2; allowed is 1: t5 has relative positions"):
        AutoModel.from_pretrained(target, trust_remote_code=True, position_step=2)


def test_states_of_float16_stay_finite(tmp_path):
    """As in the stock model, on rows that would overflow."""
    model, stock = readers_of("t5", tmp_path, "--no_verify", num_global_tokens=0, attn_implementation="eager")
    with torch.no_grad():
        for each in (model, stock):
            each.half()
            each.block[0].layer[0].SelfAttention.o.weight *= 30000
    ids = ids_of(2, 8)
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        actual, expected = (each(ids, output_hidden_states=True).hidden_states for each in (model, stock))
        assert expected[1].abs().max() > 60000
        for one, other in zip(actual, expected, strict=True):
            assert one.isfinite().all()
            assert (one - other).abs().max() < 0.01 * other.abs().max()


# Behind the layers


def test_half_precision_trains_through_the_last_norm(tmp_path):
    """What pads a batch is zeros there."""
    model, stock = lsg_of("roberta_prelayernorm", tmp_path, "--no_verify")
    states = torch.randn(2, 5, 16, dtype=torch.float64)
    close(model.LayerNorm(states), stock.LayerNorm(states))
    model.half().train()
    ids, mask = ids_of(2, 30), torch.ones(2, 30)
    mask[0, 3:] = 0
    model(ids, attention_mask=mask).last_hidden_state.float().square().mean().backward()
    assert model.LayerNorm.weight.grad.isfinite().all()


def test_no_tokenizer_is_made_up(tmp_path):
    """Without its files, Transformers makes one for T5 that knows a word beside its special tokens."""
    source = source_of("t5", tmp_path)
    for path in source.glob("*token*"):
        path.unlink()
    made_up = AutoTokenizer.from_pretrained(source)
    assert len(made_up) > len(made_up.all_special_ids)
    assert run_command(source, tmp_path / "lsg", "--quiet", "--no_verify") == 0
    assert not [*(tmp_path / "lsg").glob("token*")]
    report = json.loads((tmp_path / "lsg" / "lsg_conversion.json").read_text())
    assert any("no tokenizer" in warning for warning in report["warnings"])


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_a_decoder_alone_of_an_encoder_decoder_is_refused(name, tmp_path, capsys):
    architecture = f"{name.capitalize()}ForCausalLM"
    source = GOLDEN / name / "source" if name == "bart" else source_of(name, tmp_path)
    assert run_command(source, tmp_path / "lsg", "--architecture", architecture) == 2
    assert f"{architecture} is a decoder alone, which has no LSG" in capsys.readouterr().err
    assert not (tmp_path / "lsg").exists()
