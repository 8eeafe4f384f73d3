"""Conversions through the API: what is written, reported, refused and left behind."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Golden
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from lsg_converter import ConversionOptions, LSGConverter, convert, verify
from lsg_converter.options import SourceError, VerificationError


@pytest.fixture
def source(bert, tmp_path):
    """A copy of the recorded source that a test may change."""
    folder = tmp_path / "source"
    shutil.copytree(bert.source, folder)
    return folder


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def run(source, target, **kwargs):
    return convert(ConversionOptions(initial_model=str(source), model_name=str(target), **kwargs))


def test_report(source, tmp_path):
    steps = []
    options = ConversionOptions(
        initial_model=str(source), model_name=str(tmp_path / "a" / "b"), max_sequence_length=700
    )
    report = convert(options, steps.append)
    assert (report.model_type, report.architecture) == ("bert", "LSGBertForPreTraining")
    assert (report.source_positions, report.positions) == (512, 700)
    assert len(report.checks) == 7 and not report.warnings and not report.heads
    assert "writing" in steps and "reading 700 tokens" in steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_api_returns_a_model_that_saves_whole(source, tmp_path):
    model, tokenizer = LSGConverter(max_sequence_length=700).convert_from_pretrained(
        str(source), architecture="BertForMaskedLM", num_global_tokens=7, random_global_init=True
    )
    assert type(model).__name__ == "LSGBertForMaskedLM" and model.config.num_global_tokens == 7
    assert tokenizer.model_max_length == 700
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    ids = torch.arange(5, 100)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 700


def test_one_seed_gives_equal_bytes(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(source, tmp_path / name, random_global_init=True, seed=seed, architecture="BertForSequenceClassification")
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


@pytest.mark.full
def test_heads_are_run_whatever_the_checkpoint_has(source, tmp_path):
    """A classifier of three classes, and a head for choices, which has one score: both are named `classifier`."""
    change_config(source, id2label={"0": "a", "1": "b", "2": "c"})
    options = {"architecture": "BertForSequenceClassification", "max_sequence_length": 600, "run_test": True}
    heads = run(source, tmp_path / "lsg", **options).heads
    assert {"AutoModelForSequenceClassification", "AutoModelForMultipleChoice"} <= {head.auto_class for head in heads}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(source, tmp_path, dtype):
    change_weights(source, lambda weights: {name: value.to(dtype) for name, value in weights.items()})
    change_config(source, torch_dtype=str(dtype).removeprefix("torch."))
    run(source, tmp_path / "lsg", run_test=True)
    assert {value.dtype for value in load_file(tmp_path / "lsg" / "model.safetensors").values()} == {dtype}
    assert AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True, dtype="auto").dtype == dtype


def test_old_names_come_out_modern(source, bert, tmp_path):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    change_weights(source, lambda weights: {old(name): value for name, value in weights.items()})
    run(source, tmp_path / "lsg")
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "lsg", bert.source))
    for name, value in expected.items():
        if "position" not in name:
            assert torch.equal(written[name], value)


def test_what_the_source_holds_apart_stays_apart(source, tmp_path):
    """Where the files hold two values for what config.json ties."""
    change_weights(source, lambda w: {**w, "cls.predictions.decoder.weight": torch.rand(120, 16)})
    run(source, tmp_path / "lsg")
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "lsg", source))
    for name in ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"):
        assert torch.equal(written[name], original[name])
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "lsg", trust_remote_code=True)
    assert torch.equal(model.cls.predictions.decoder.weight, original["cls.predictions.decoder.weight"])


def test_another_head(source, tmp_path):
    report = run(source, tmp_path / "lsg", architecture="LSGBertForSequenceClassification")
    assert report.architecture == "LSGBertForSequenceClassification"
    assert report.new_weights == ["classifier.bias", "classifier.weight"]
    assert "cls.predictions.bias" in report.dropped_weights
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "lsg", trust_remote_code=True)


def test_fewer_positions_are_said(source, tmp_path):
    report = run(source, tmp_path / "lsg", max_sequence_length=300)
    assert report.warnings == ["the last 212 of the source's 512 positions are lost"]


def test_a_source_of_few_positions(source, tmp_path):
    change_config(source, max_position_embeddings=100)
    name = "bert.embeddings.position_embeddings.weight"
    change_weights(source, lambda weights: {**weights, name: weights[name][:100].clone()})
    report = run(source, tmp_path / "lsg", max_sequence_length=1000)
    assert report.source_positions == 100 and len(report.warnings) == 1
    assert report.warnings[0].startswith("with blocks of 128 a token sees 384 places, among which the source's 100 ")
    assert "take blocks of 32, by block_size and sparse_block_size" in report.warnings[0]
    change_config(source, is_decoder=True)
    options = {"max_sequence_length": 1000, "architecture": "BertLMHeadModel"}
    assert "sees 256 places" in run(source, tmp_path / "causal", **options).warnings[0]
    change_config(source, is_decoder=False)
    for name, options in (("small", {"model_kwargs": {"block_size": 32}}), ("stretch", {"position_init": "stretch"})):
        assert not run(source, tmp_path / name, max_sequence_length=1000, **options).warnings


def test_no_tokenizer(source, tmp_path):
    for path in source.glob("*token*"):
        path.unlink()
    report = run(source, tmp_path / "lsg")
    assert any("no tokenizer" in warning for warning in report.warnings)
    assert sum("mean word" in warning for warning in report.warnings) == 2
    model, tokenizer = LSGConverter().convert_from_pretrained(str(source))
    assert tokenizer is None and model.config.max_position_embeddings == 4096


@pytest.mark.parametrize("where", ["absent", "outside"])
def test_no_mask_token(source, tmp_path, where):
    if where == "absent":
        path = source / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token"}))
        path = source / "special_tokens_map.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token"}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_special_tokens({"mask_token": "<beyond>"})
        assert tokenizer.mask_token_id >= 120
        (source / "special_tokens_map.json").unlink()
        tokenizer.save_pretrained(source)
    report = run(source, tmp_path / "lsg")
    (warning,) = report.warnings
    assert "no MASK token" in warning and "mean word" in warning
    words = load_file(source / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    weights = load_file(tmp_path / "lsg" / "model.safetensors")
    rest = weights["bert.embeddings.global_embeddings.weight"][1]
    position = weights["bert.embeddings.position_embeddings.weight"][64]
    kind = weights["bert.embeddings.token_type_embeddings.weight"][0]
    torch.testing.assert_close(rest, position + words.mean(0) + kind)


def test_truncation_of_the_old_length_is_gone(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.enable_truncation(128)
    tokenizer.save_pretrained(source)
    run(source, tmp_path / "lsg")
    assert json.loads((tmp_path / "lsg" / "tokenizer.json").read_text())["truncation"]["max_length"] == 4096
    assert len(AutoTokenizer.from_pretrained(tmp_path / "lsg")("a " * 600)["input_ids"]) >= 600


@pytest.mark.parametrize(
    "lsg",
    [
        {"adaptive": False, "block_size": 32},
        {"num_global_tokens": 0},
        {"num_global_tokens": 0, "mask_first_token": True},
        {"sparsity_type": "lsh"},
    ],
)
def test_every_kind_of_attention_is_verified(source, tmp_path, lsg):
    report = run(source, tmp_path / "lsg", max_sequence_length=555, model_kwargs=lsg)
    exact = [check for check in report.checks if check.name == "256 tokens give what the source gives"]
    assert len(report.checks) == 7 + len(exact)
    # Without global tokens, to the bit.
    assert [check.figure for check in exact] == ["to the bit"] * (lsg == {"num_global_tokens": 0})


@pytest.mark.parametrize("name", ["bert", "roberta", "bart", "pegasus"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact(name, dtype, tmp_path):
    """What the source could read comes out as the source's, at every length, alone and beside a longer text."""
    source = Golden(name).source
    report = run(source, tmp_path / "lsg", max_sequence_length=1000, exact=True, dtype=dtype)
    assert report.lsg["num_global_tokens"] == 0 and report.lsg["full_attention_length"] == 512
    assert any(check.name == "1, 256, 257, 511, 512 tokens give what the source gives" for check in report.checks)
    if dtype == "bfloat16":
        return
    stock = AutoModel.from_pretrained(source).eval()
    lsg = AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True).eval()
    ids = torch.randint(5, 100, (3, 700), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([300, 512, 700])
    mask = (torch.arange(700) < lengths[:, None]).long()
    more = {"decoder_input_ids": ids[:, :4]} if stock.config.is_encoder_decoder else {}
    with torch.no_grad():
        together = lsg(input_ids=ids, attention_mask=mask, **more)
        for row, length in enumerate(lengths[:2].tolist()):
            own = {name: value[row : row + 1] for name, value in more.items()}
            alone = stock(input_ids=ids[row : row + 1, :length], **own)
            for key in ("last_hidden_state", "encoder_last_hidden_state"):
                if key in alone:
                    actual = together[key][row : row + 1, : alone[key].shape[1]]
                    torch.testing.assert_close(actual, alone[key], rtol=0, atol=5e-5)


def test_exact_is_advised_where_a_model_is_used_as_it_is(source, tmp_path):
    def said(**options):
        return run(source, tmp_path / "lsg", dry_run=True, **options).advice

    assert said() == [] == said(architecture="BertForSequenceClassification")  # a new head is trained anyway
    change_config(source, architectures=["BertForSequenceClassification"])
    (line,) = said()
    assert line.startswith("--exact gives for texts up to 512 tokens what the source gives")
    assert said(exact=True) == []
    change_config(source, architectures=["BertModel"])
    assert said() == []
    (source / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}]))
    assert said() == [line]
    assert said(model_kwargs={"num_global_tokens": 16})[1].startswith("16 global tokens that nothing has trained")


def test_how_far_the_first_token_sees_is_said(source, tmp_path):
    """Where no token sees all: 256 tokens more than the blocks beside its own, and 384 more with each further layer."""

    def said(**options):
        report = run(source, tmp_path / "lsg", dry_run=True, **{"max_sequence_length": 1000, "exact": True, **options})
        return [line for line in report.warnings if "no token sees all" in line]

    assert said(exact=False) == [] == said(max_sequence_length=896) == said(architecture="BertForMaskedLM")
    (line,) = said()
    assert "behind token 896: for longer texts load it with num_global_tokens=1" in line
    run(source, tmp_path / "long", max_sequence_length=1000, exact=True)
    for g, expected in ((0, 896), (1, 1000)):
        model = AutoModel.from_pretrained(
            tmp_path / "long", trust_remote_code=True, num_global_tokens=g, sparsity_type="pooling"
        ).eval()
        states = torch.randn(1, 1000, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model(inputs_embeds=states).last_hidden_state[0, 0].norm().backward()
        assert states.grad[0].any(dim=-1).nonzero().max() + 1 == expected
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    for mode in ("cls", "mean"):
        (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        assert bool(said()) is (mode == "cls")


# What is refused; test_faults.py has more.


def test_pickles_are_not_loaded(source, tmp_path):
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="safetensors"):
        run(source, tmp_path / "lsg")


def test_the_code_of_a_source_is_never_run(source, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        auto_map = {"AutoConfig": "evil.C", "AutoModelForPreTraining": "evil.C", "AutoTokenizer": ["evil.C", None]}
        (source / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    run(source, tmp_path / "lsg")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "lsg" / "evil.py").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "lsg" / name).read_text()


def without(*parts):
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


# The verification finds what is wrong.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda w: {**w, "bert.pooler.dense.bias": w["bert.pooler.dense.bias"] + 1e-7},
            "bert.pooler.dense.bias is not",
        ),
        (lambda w: {**w, "cls.seq_relationship.bias": -w["cls.seq_relationship.bias"]}, "is not the source's"),
        (without("pooler.dense.weight"), "the weight bert.pooler.dense.weight is missing"),
        (lambda w: {**w, "extra": torch.zeros(1)}, "weights that the source lacks: extra"),
        (lambda w: swap(w, "position_embeddings", 600), "position_embeddings.weight does not repeat"),
        (lambda w: swap(w, "global_embeddings", 5), "row 5 of the global tokens is not as it should"),
    ],
)
def test_verification_finds_damaged_weights(source, tmp_path, monkeypatch, damage, message):

    def damaged_checks(source, config, folder, announce):
        path = folder / "model.safetensors"
        save_file(damage(load_file(path)), path, metadata={"format": "pt"})
        return checks(source, config, folder, announce)

    checks = verify.checks
    monkeypatch.setattr(verify, "checks", damaged_checks)
    with pytest.raises(VerificationError, match=message):
        run(source, tmp_path / "lsg")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def swap(weights, name, row):
    (key,) = [key for key in weights if name in key]
    table = weights[key].clone()
    table[[row, row + 1]] = table[[row + 1, row]]
    return {**weights, key: table}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "lsg_modeling.py",
            "dtype=torch.bool)\n        if config.mask",
            "dtype=torch.bool) | True\n        if config.mask",
            "padding",
        ),
        ("lsg_cpu.py", "head_dim).transpose(1, 2)\n\n", "head_dim).transpose(1, 2) / 0\n\n", "not finite"),
        ("lsg_modules.py", "text = states[:, g:]", "text = states", "16 tokens give 17 states"),
    ],
)
def test_verification_finds_damaged_code(source, tmp_path, monkeypatch, file, old, new, message):
    """It runs the files that were written."""
    finite = verify.unchanged_weights

    def damage_then_check(source, stock, written, new_weights):
        (folder,) = tmp_path.glob(".lsg-*/lsg")
        code = (folder / file).read_text()
        assert old in code
        (folder / file).write_text(code.replace(old, new))
        return finite(source, stock, written, new_weights)

    monkeypatch.setattr(verify, "unchanged_weights", damage_then_check)
    with pytest.raises(VerificationError, match=message):
        run(source, tmp_path / "lsg")


def test_verification_finds_another_tokenizer(source, tmp_path, monkeypatch):
    module = importlib.import_module("lsg_converter.conversion")
    write = module.write_tokenizer

    def write_another(tokenizer, source, folder):
        write(tokenizer, source, folder)
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"<unk>": 1', '"<unk>": 3').replace('"</s>": 3', '"</s>": 1'))

    monkeypatch.setattr(module, "write_tokenizer", write_another)
    with pytest.raises(VerificationError, match="the tokenizer"):
        run(source, tmp_path / "lsg")
