"""Positions that are stretched by a whole factor: what a text reads of the table follows its own length."""

from functools import cache

import pytest
import torch
from conftest import Golden, Made, run_command
from huggingface_hub.errors import StrictDataclassError
from made import LIKE
from test_modeling import cache_of
from transformers import AutoModel

from lsg_converter import LSGEncoderDecoderModel, families
from lsg_converter.modeling.modeling_lsg_bert import LSGBertConfig
from lsg_converter.modeling.modeling_lsg_pegasus import LSGPegasusConfig
from lsg_converter.surgery import stepped_positions


TRAINED, STEP = 512, 3
TABLE = TRAINED * STEP
SMALL = {"block_size": 4, "sparse_block_size": 4}
# These compute their positions, or have none.
COMPUTED = ("pegasus", "m2m_100", "marian", "esm", "deberta", "t5", "mt5", "umt5")
FAMILIES = [name for kind in families.model_types() if (name := kind.replace("-", "_")) not in COMPUTED]


@pytest.fixture(scope="module")
def converted_by(tmp_path_factory):
    """A family's source, by its name, converted by --exact with a `position_init`."""

    @cache
    def convert(name, init="stretch"):
        target = tmp_path_factory.mktemp(name) / "lsg"
        flags = "--exact", "--quiet", "--max_sequence_length", str(TABLE), "--position_init", init
        source = Made(name, target.parent) if name in LIKE else Golden(name)
        assert run_command(source.source, target, *flags) == 0
        return target

    return convert


def reader(folder, **kwargs):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()
    return model.get_encoder() if model.config.is_encoder_decoder else model


def small(folder):
    return reader(folder, dtype=torch.float64, full_attention_length=None, **SMALL)


@pytest.fixture
def model(golden, converted_by):
    return small(converted_by(golden.name))


def table_of(model):
    return getattr(model, "embeddings", model).get_parameter(
        "embed_positions.weight" if hasattr(model, "embed_positions") else "position_embeddings.weight"
    )


def rows_read(model, *args, **kwargs):
    """Which rows of its table, counted from the first token's, a model reads: they alone have a gradient."""
    table = table_of(model)
    table.requires_grad_(True).grad = None
    output = model(*args, **kwargs).last_hidden_state
    mask = kwargs.get("attention_mask", torch.ones(output.shape[:2]))
    weight = torch.rand(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
    (output * weight * mask[:, :, None]).sum().backward()
    read = table.grad.abs().sum(dim=1).nonzero()[:, 0] - model.special_positions(model.config)
    return read.tolist()


def ids_of(rows, tokens):
    return torch.randint(5, 100, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def states(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


def test_rows_of_the_table():
    table = torch.tensor([7.0, 9.0, 0.0, 3.0, -3.0])[:, None]
    expected = [7, 9, 0, 1, 2, 3, 1, -1, -3, -3, -3]
    torch.testing.assert_close(stepped_positions(table, 3, offset=2)[:, 0], torch.tensor(expected).float())
    trained = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    trained[3] = -0.0
    long = stepped_positions(trained, 8)
    assert long.shape == (320, 4) and torch.equal(long[::8].view(torch.int16), trained.view(torch.int16))
    assert torch.equal(stepped_positions(trained, 1), trained)


@pytest.mark.few_families
@pytest.mark.made_families
def test_short_texts_read_the_trained_rows_alone(golden, converted_by):
    """To the bit what repeated positions give, alone and beside a long one; a long one reads others."""
    repeated, stretched = (reader(converted_by(golden.name, init)) for init in ("tile", "stretch"))
    ids = ids_of(3, 700)
    mask = (torch.arange(700) < torch.tensor([[30], [TRAINED], [700]])).long()
    for tokens in (1, 30, TRAINED):
        assert torch.equal(states(stretched, ids[:1, :tokens]), states(repeated, ids[:1, :tokens]))
    together, expected = (states(x, ids, attention_mask=mask) for x in (stretched, repeated))
    short = mask[:2].bool()
    assert torch.equal(together[:2][short], expected[:2][short])
    assert (together[2] - expected[2]).abs().max() > 1e-3


@pytest.mark.few_families
@pytest.mark.parametrize("kernel", ["eager", "cpu", "portable"])
def test_each_row_goes_in_its_own_step(model, kernel):
    """And gives alone what it gives in a batch, padded, whether that is packed or not."""
    model.set_attn_implementation("eager" if kernel == "eager" else "sdpa")
    model.config.attention_kernel = None if kernel == "eager" else kernel
    lengths = [TRAINED, TRAINED + 1, TABLE // 2, TABLE // 2 + 1, 5]
    ids, step = ids_of(5, TABLE // 2 + 5), [STEP, STEP - 1, STEP - 1, 1, STEP]
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    if kernel == "eager":
        lengths, ids, mask = lengths[::4], ids[::4, :TRAINED], mask[::4, :TRAINED]
    together = states(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, :length]
        torch.testing.assert_close(together[row, :length], states(model, own)[0], rtol=0, atol=1e-10)
        if kernel == "cpu":
            assert rows_read(model, own) == [step[row] * place for place in range(length)]


@pytest.mark.few_families
def test_the_longest_text_reads_every_row(model):
    assert rows_read(model, ids_of(1, TABLE)) == [*range(TABLE)]
    with pytest.raises(ValueError, match=f"got a text of {TABLE + 1} tokens"):
        model(ids_of(1, TABLE + 1))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_on_the_left(name, converted_by):
    """Positions follow it in RoBERTa. In BERT they count from the edge, and the length does too."""
    model, left, tokens = small(converted_by(name)), 4, TRAINED - 2
    ids = torch.nn.functional.pad(ids_of(1, tokens), (left, 0), value=model.config.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones(1, tokens), (left, 0)).long()
    read = rows_read(model, ids, attention_mask=mask)
    if model.positions_follow_padding:
        assert read == [STEP * place for place in range(tokens)]
        alone = states(model, ids[:, left:])
        torch.testing.assert_close(states(model, ids, attention_mask=mask)[:, left:], alone, rtol=0, atol=1e-10)
    else:
        assert read == [(STEP - 1) * place for place in range(left, left + tokens)]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_cache_in_front_of_a_text_is_a_part_of_its_length(name, converted_by):
    repeated, stretched = (small(converted_by(name, init)) for init in ("tile", "stretch"))
    for tokens, same in ((TRAINED - 3, True), (TRAINED - 2, False)):
        results = [
            states(each, ids_of(2, tokens), past_key_values=cache_of(each, 3)[0]) for each in (repeated, stretched)
        ]
        assert torch.equal(*results) == same


def test_the_encoder_of_two_checkpoints_may_be_stretched(converted_by):
    stretched, repeated = converted_by("bert"), converted_by("bert", "tile")
    joined = LSGEncoderDecoderModel.from_encoder_decoder_pretrained(
        stretched, repeated, decoder_full_attention_length=None, decoder_start_token_id=5, pad_token_id=0
    ).eval()
    encoded = joined(ids_of(1, 700), decoder_input_ids=ids_of(1, 3)).encoder_last_hidden_state
    assert torch.equal(encoded, states(reader(stretched), ids_of(1, 700)))
    with pytest.raises(StrictDataclassError, match="position_step: got 3; allowed is 1 in the causal form"):
        LSGEncoderDecoderModel.from_encoder_decoder_pretrained(
            repeated, stretched, decoder_full_attention_length=None, decoder_start_token_id=5, pad_token_id=0
        )


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_positions_that_are_given_are_used_as_they_are(name, converted_by):
    model, places = small(converted_by(name)), torch.tensor([[8, 9, 30, 31, 600]])
    given = places + model.special_positions(model.config)
    assert rows_read(model, ids_of(1, 5), position_ids=given) == places[0].tolist()
    embeds = model.get_input_embeddings()(ids_of(1, 5)).detach()
    assert torch.equal(states(model, inputs_embeds=embeds), states(model, ids_of(1, 5)))


def test_the_verification_sees_another_step(bert, tmp_path, capsys, monkeypatch):
    flags = ["--max_sequence_length", str(TABLE), "--position_init", "stretch", "--exact"]
    assert run_command(bert.source, tmp_path / "lsg", *flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        f"the {TRAINED} trained rows, stretched by {STEP} to {TABLE}",
        f"lie between the source's ({TABLE} rows, those at multiples of {STEP} to the bit",
        "1, 256, 257, 511, 512 tokens give what the source gives (to the bit)",
    ):
        assert text in shown, text

    def shifted(table, step, offset=0):
        return stepped_positions(table, step, offset).roll(1, dims=0)

    monkeypatch.setattr("lsg_converter.surgery.stepped_positions", shifted)
    assert run_command(bert.source, tmp_path / "other", *flags) == 1
    assert f"has not the source's rows at multiples of {STEP}" in capsys.readouterr().err


def test_what_was_stretched_is_stretched_again(converted_by, tmp_path, capsys):
    """The trained rows stay, and short texts with them."""
    flags = ["--rebuild_global_tokens", "--model_kwargs", "{'num_global_tokens': 0}"]
    flags += ["--max_sequence_length", str(2 * TABLE), "--quiet"]
    assert run_command(converted_by("bert"), tmp_path / "no", *flags) == 2
    assert "the positions of the source are stretched already: give stretch" in capsys.readouterr().err
    assert run_command(converted_by("bert"), tmp_path / "lsg", *flags, "--position_init", "stretch") == 0
    once, twice = reader(converted_by("bert")), reader(tmp_path / "lsg")
    assert twice.config.position_step == 2 * STEP
    assert torch.equal(states(twice, ids_of(1, TRAINED)), states(once, ids_of(1, TRAINED)))
    off = reader(tmp_path / "lsg", position_step=1)
    assert rows_read(off, ids_of(1, 5)) == [0, 1, 2, 3, 4]


REFUSED = [
    ("bert", ["--max_sequence_length", "1000"], "give a multiple of the source's 512 positions, such as 1024"),
    ("bert", ["--architecture", "BertLMHeadModel"], "--position_init: got 'stretch' for a decoder"),
    ("bert", ["--model_kwargs", "{'position_step': 2}"], "--model_kwargs: got position_step"),
    ("pegasus", [], "pegasus computes its positions"),
]


@pytest.mark.parametrize(("name", "flags", "message"), REFUSED)
def test_what_is_refused(name, flags, message, tmp_path, capsys):
    assert run_command(Golden(name).source, tmp_path / "lsg", "--position_init", "stretch", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_fields_that_are_refused():
    with pytest.raises(StrictDataclassError, match="position_step: got 0; allowed is at least 1"):
        LSGBertConfig(position_step=0)
    with pytest.raises(StrictDataclassError, match="position_step: got 2; allowed is 1 in the causal form"):
        LSGBertConfig(position_step=2, is_decoder=True)
    with pytest.raises(
        StrictDataclassError, match="position_step: got 2; allowed is 1: pegasus computes its positions"
    ):
        LSGPegasusConfig(position_step=2)
