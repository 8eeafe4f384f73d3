"""What sentence-transformers builds on these models: converted by the command, from the layouts of well-known ones.

ColBERT's, of its authors and of PyLate, are in `test_travel.py`.
"""

import shutil

import pytest
import torch
import transformers
from conftest import GOLDEN, Made, run_command
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from test_travel import change, write, write_modules


FLAGS = ("--exact", "--max_sequence_length", "1000", "--quiet", "--no_verify")
SHORT = ["query: w20 w31 w9", "query: " + "w100 w7 w8 " * 130]  # beyond two blocks, and within the source's 512
LATE = ["passage: " + "w9 " * 600 + end for end in ("w20 w31", "w41 w7")]


def make_source(folder, like, head):
    """A tiny checkpoint of a family, of the class with that head."""
    shutil.copytree(GOLDEN / like / "source", folder)
    change(folder / "config.json", architectures=[{"bert": "Bert", "xlm_roberta": "XLMRoberta"}[like] + head])


def add_pooling(folder, mode):
    """The files of an embedder: pooling, normalisation, and a limit of their own."""
    modes = {f"pooling_mode_{name}": name.startswith(mode) for name in ("cls_token", "mean_tokens", "max_tokens")}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **modes})
    kinds = [("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_modules(folder, *[(path, f"sentence_transformers.models.{kind}") for path, kind in kinds])
    write(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})


EMBEDDERS = [
    ("intfloat/e5-small-v2", "bert", "mean"),
    ("BAAI/bge-m3", "xlm_roberta", "cls"),
    pytest.param("intfloat/multilingual-e5-base", "xlm_roberta", "mean", marks=pytest.mark.full),
    pytest.param("BAAI/bge-small-en-v1.5", "bert", "cls", marks=pytest.mark.full),
]


@pytest.mark.parametrize("name, like, pooling", EMBEDDERS)
def test_embedders(name, like, pooling, tmp_path):
    make_source(tmp_path / name, like, "Model")
    add_pooling(tmp_path / name, pooling)
    assert run_command(tmp_path / name, tmp_path / "lsg", *FLAGS) == 0
    source = SentenceTransformer(str(tmp_path / name), device="cpu")
    model = SentenceTransformer(str(tmp_path / "lsg"), device="cpu", trust_remote_code=True)
    assert model.max_seq_length == 1000 and source.max_seq_length == 512
    assert abs(model.encode(SHORT) - source.encode(SHORT)).max() < 1e-6
    (one, other), (cut, same) = model.encode(LATE), source.encode(LATE)
    assert abs(one - other).max() > 1e-4 and (cut == same).all()
    assert abs((one**2).sum() - 1) < 1e-6


@pytest.mark.parametrize("name", ["t5", *[pytest.param(name, marks=pytest.mark.full) for name in ("mt5", "umt5")]])
def test_sentence_t5(name, tmp_path):
    """sentence-transformers would take the stock encoder. What it saves is read again, and converted again."""
    made, source = Made(name, tmp_path / "made").source, tmp_path / "sentence-t5-base"
    getattr(transformers, f"{name.upper()}EncoderModel").from_pretrained(made).save_pretrained(source)
    for path in made.glob("*token*"):
        shutil.copy(path, source)
    add_pooling(source, "mean")
    assert run_command(source, tmp_path / "lsg", *FLAGS) == 0
    stock = SentenceTransformer(str(source), device="cpu")
    model = SentenceTransformer(str(tmp_path / "lsg"), device="cpu", trust_remote_code=True)
    assert type(model[0].auto_model).__name__ == f"LSG{name.upper()}EncoderModel" and model.max_seq_length == 1000
    assert abs(model.encode(SHORT) - stock.encode(SHORT)).max() < 1e-4
    one, other = model.encode(LATE)
    assert abs(one - other).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    flags = ("--resize_lsg", "--max_sequence_length", "900", "--quiet")
    assert run_command(tmp_path / "saved", tmp_path / "again", *flags) == 0
    for folder, length in (("saved", 1000), ("again", 900)):
        other = SentenceTransformer(str(tmp_path / folder), device="cpu", trust_remote_code=True)
        assert other.max_seq_length == length and abs(other.encode(SHORT) - model.encode(SHORT)).max() < 1e-6
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "lsg"), device="cpu")


def test_splade(tmp_path):
    make_source(tmp_path / "bert", "bert", "ForMaskedLM")
    source = SparseEncoder(str(tmp_path / "bert"), device="cpu")
    source.save_pretrained(str(tmp_path / "naver" / "splade-v3"))
    assert run_command(tmp_path / "naver" / "splade-v3", tmp_path / "lsg", *FLAGS) == 0
    model = SparseEncoder(str(tmp_path / "lsg"), device="cpu", trust_remote_code=True)
    assert model.max_seq_length == 1000
    expected, actual = (encoder.encode(SHORT).to_dense() for encoder in (source, model))
    assert (expected > 0).any() and (expected == 0).any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    one, other = model.encode(LATE).to_dense()
    cut, same = source.encode(LATE).to_dense()
    assert (one - other).abs().max() > 1e-4 and torch.equal(cut, same)


RERANKERS = [
    ("cross-encoder/ms-marco-MiniLM-L6-v2", "bert"),
    pytest.param("BAAI/bge-reranker-base", "xlm_roberta", marks=pytest.mark.full),
]


@pytest.mark.parametrize("name, like", RERANKERS)
def test_rerankers(name, like, tmp_path):
    make_source(tmp_path / "base", like, "Model")
    source = CrossEncoder(str(tmp_path / "base"), num_labels=1, device="cpu", max_length=512)
    source.save_pretrained(str(tmp_path / name))
    assert run_command(tmp_path / name, tmp_path / "lsg", *FLAGS) == 0
    model = CrossEncoder(str(tmp_path / "lsg"), device="cpu", trust_remote_code=True)
    short, late = ([("w20 w7", text) for text in texts] for texts in (SHORT, LATE))
    assert model.max_length == 1000
    assert abs(model.predict(short) - source.predict(short)).max() < 1e-6
    one, other = model.predict(late)
    cut, same = source.predict(late)
    assert abs(one - other) > 1e-6 and cut == same


@pytest.mark.full
def test_a_reranker_trains(tmp_path):
    make_source(tmp_path / "base", "bert", "Model")
    assert run_command(tmp_path / "base", tmp_path / "lsg", *FLAGS) == 0
    model = CrossEncoder(str(tmp_path / "lsg"), num_labels=1, device="cpu", trust_remote_code=True)
    data = Dataset.from_dict({"query": ["w20 w7"] * 2, "text": LATE, "label": [0.0, 1.0]})
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "out"), max_steps=1, learning_rate=0.01, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    pairs = [("w20 w7", text) for text in LATE]
    before = model.predict(pairs)
    assert CrossEncoderTrainer(model, arguments, train_dataset=data).train().global_step == 1
    after = model.predict(pairs)
    assert abs(after - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "trained"))
    again = CrossEncoder(str(tmp_path / "trained"), device="cpu", trust_remote_code=True)
    assert abs(again.predict(pairs) - after).max() < 1e-6
