"""What travels with a model: limits, modules and heads; what does not is named."""

import json
import re
import shutil

import pytest
import torch
from conftest import run_command
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lsg_converter import ConversionOptions, LSGConverter
from lsg_converter.source import TOKENIZER_FILES, locate


LONG = ("--max_sequence_length", "1000")
EXACT = (*LONG, "--model_kwargs", "{'num_global_tokens': 0}", "--quiet")
TEXTS = ["w20 w31 w9", "w100 w7 w8 w41 w30"]


@pytest.fixture
def source(bert, tmp_path):
    """A BERT without a head."""
    shutil.copytree(bert.source, tmp_path / "source")
    change(tmp_path / "source" / "config.json", architectures=["BertModel"])
    return tmp_path / "source"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that puts a folder on the Hub, and returns its name there. The Hub lists it where `listed` says so."""

    def put(folder, listed=True):
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

        def download(name, allow_patterns=None, ignore_patterns=None, **_):
            snapshot = tmp_path / "snapshots" / ("0" * 40)
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, snapshot / file)
            return str(snapshot)

        monkeypatch.setattr("lsg_converter.source.snapshot_download", download)
        if listed:
            monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, revision: files)
        return "somebody/model"

    return put


def read(path):
    return json.loads(path.read_text())


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def change(path, **content):
    write(path, {**(read(path) if path.exists() else {}), **content})


def write_modules(folder, *modules):
    every = [("", "sentence_transformers.models.Transformer"), *modules]
    items = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(every)]
    write(folder / "modules.json", items)


def add_dense(folder, kind="sentence_transformers.models.Dense"):
    """Mean pooling, and a Dense module whose weights are pickled."""
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    shape = {"in_features": 16, "out_features": 8, "bias": False}
    write(folder / "2_Dense" / "config.json", {**shape, "activation_function": "torch.nn.modules.activation.Tanh"})
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"linear.weight": weight}, folder / "2_Dense" / "pytorch_model.bin")
    write_modules(folder, ("1_Pooling", "sentence_transformers.models.Pooling"), ("2_Dense", kind))


def run_card(folder, monkeypatch):
    """Run the card's code, and return its names."""
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


# Limits

LIMITS = {
    "max_length", "model_max_length", "max_seq_length", "max_seq_len", "document_length", "n_positions",
    "max_position_embeddings",
}  # fmt: skip


def limits(content):
    """Every limit in the content of a JSON file, by name."""
    if isinstance(content, list):
        return [limit for item in content for limit in limits(item)]
    if not isinstance(content, dict):
        return []
    found = [(name, value) for name, value in content.items() if name in LIMITS and value is not None]
    return found + [limit for value in content.values() for limit in limits(value)]


@pytest.mark.parametrize("length", [1000, 100])
def test_every_limit_is_the_new_length(source, tmp_path, length):
    content = read(source / "tokenizer.json")
    content["truncation"] = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    write(source / "tokenizer.json", content)
    change(source / "tokenizer_config.json", max_length=128)
    change(
        source / "config.json", max_seq_length=128, n_positions=512, task_specific_params={"a": {"n_positions": 512}}
    )
    write_modules(source)
    write(
        source / "sentence_bert_config.json",
        {"max_seq_length": 128, "document_length": 180, "processing_kwargs": {"text": {"max_length": 128}}},
    )
    write(source / "config_sentence_transformers.json", {"document_length": 180, "query_length": 32})
    target = tmp_path / "lsg"
    assert run_command(source, target, "--max_sequence_length", str(length), "--quiet") == 0
    files = {path.name: read(path) for path in target.glob("*.json") if path.name != "lsg_conversion.json"}
    found = [limit for content in files.values() for limit in limits(content)]
    assert len(found) == 10 and {value for _, value in found} == {length}
    assert files["config_sentence_transformers.json"]["query_length"] == 32  # to which queries are padded
    # What reads tokenizer.json alone gets rows of one length, as from the source, and as long as the model allows.
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert [len(item.ids) for item in tokenizer.encode_batch(["w9 " * n for n in (5, 700)])] == [min(702, length)] * 2
    assert len(AutoTokenizer.from_pretrained(target)("w9 " * 700)["input_ids"]) == 702


# Modules


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_pickled_modules_travel_by_a_flag(source, hub, tmp_path, capsys, on_the_hub):
    add_dense(source)
    expected = SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    name = hub(source, listed=False) if on_the_hub else source
    assert run_command(name, tmp_path / "without", *LONG) == 0
    said = capsys.readouterr().out
    assert "2_Dense/pytorch_model.bin of the source is pickled, and only --allow_pickle copies it" in said
    assert "SentenceTransformer" not in said and not (tmp_path / "without" / "modules.json").exists()
    assert read(tmp_path / "without" / "lsg_conversion.json")["sentence_class"] is None
    assert run_command(name, tmp_path / "with", *EXACT, "--allow_pickle") == 0
    model = SentenceTransformer(str(tmp_path / "with"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), torch.tensor(expected), rtol=0, atol=1e-6)


def other_code(folder):
    write_modules(folder, ("1_Own", "own.Module"))


def outside(folder):
    write_modules(folder, ("..", "sentence_transformers.models.Normalize"))


def nested(folder):
    write_modules(folder, ("a/b", "sentence_transformers.models.Normalize"))


def second_model(folder):
    """A router has models in its folder."""
    write(folder / "1_Router" / "router_config.json", {})
    write(folder / "1_Router" / "config.json", {})
    (folder / "1_Router" / "0_Transformer").mkdir()
    write_modules(folder, ("1_Router", "sentence_transformers.models.Router"))


def model_elsewhere(folder):
    write_modules(folder)
    change_first = read(folder / "modules.json")
    change_first[0]["path"] = "0_Transformer"
    write(folder / "modules.json", change_first)


def damaged(folder):
    (folder / "modules.json").write_text('[{"idx"')


@pytest.mark.parametrize("change", [other_code, outside, nested, second_model, model_elsewhere, damaged])
def test_modules_that_cannot_travel_are_named(source, tmp_path, capsys, change):
    change(source)
    before = sorted(tmp_path.iterdir())
    assert run_command(source, tmp_path / "lsg", "--no_verify") == 0
    assert "its modules of sentence-transformers are not copied" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "lsg"])
    report = read(tmp_path / "lsg" / "lsg_conversion.json")
    assert report["sentence_class"] is None and "modules.json" in report["left_out"]
    assert not any(name.startswith(("modules.json", "1_")) for name in report["files"])


@pytest.mark.parametrize("model_class", [SentenceTransformer, CrossEncoder, SparseEncoder])
def test_the_card_loads_the_kind_of_model_that_it_was(source, tmp_path, monkeypatch, model_class):
    if model_class is CrossEncoder:  # with another activation than the default
        model = CrossEncoder(str(source), num_labels=1, activation_fn=torch.nn.Identity())
    else:
        change(source / "config.json", architectures=["BertForMaskedLM"])  # of which SPLADE is made
        model = model_class(str(source))
    model.save_pretrained(str(tmp_path / "saved"))
    assert run_command(tmp_path / "saved", tmp_path / "lsg", *EXACT) == 0
    names = run_card(tmp_path / "lsg", monkeypatch)
    assert type(names["model"]) is model_class
    if model_class is CrossEncoder:
        assert type(names["model"].activation_fn) is torch.nn.Identity
        pairs = [("w9 w20", text) for text in TEXTS]
        assert abs(names["model"].predict(pairs) - model.predict(pairs)).max() < 1e-6


# ColBERT


def add_projection(folder):
    """Make the folder a ColBERT checkpoint, as its authors' library writes them."""
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "bert." in name}
    state["linear.weight"] = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", architectures=["HF_ColBERT"])
    settings = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 24, "doc_maxlen": 100}
    write(folder / "artifact.metadata", settings)


def add_pylate(folder):
    add_dense(folder)
    write_modules(folder, ("2_Dense", "pylate.models.Dense.Dense"))
    change(
        folder / "config_sentence_transformers.json", model_type="ColBERT", query_prefix="[unused0]",
        document_prefix="[unused1]", query_length=24, document_length=100, attend_to_expansion_tokens=False,
    )  # fmt: skip


@pytest.mark.parametrize("add", [add_projection, add_pylate])
@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_colbert_stays_one(source, hub, tmp_path, monkeypatch, add, on_the_hub):
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace('"w5"', '"[unused0]"').replace('"w6"', '"[unused1]"'))
    add(source)
    flags = ("--architecture", "BertModel", "--allow_pickle")
    assert run_command(hub(source) if on_the_hub else source, tmp_path / "lsg", *EXACT, *flags) == 0
    original = MultiVectorEncoder(str(source), device="cpu")
    model = run_card(tmp_path / "lsg", monkeypatch)["model"]
    assert type(model) is MultiVectorEncoder
    for one, other in ((original.encode_query, model.encode_query), (original.encode_document, model.encode_document)):
        for expected, actual in zip(one(TEXTS), other(TEXTS), strict=True):
            assert len(expected) in (24, 6, 8)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert len(original.encode_document("w9 " * 900)) == 100 and len(model.encode_document("w9 " * 900)) == 903
    report = read(tmp_path / "lsg" / "lsg_conversion.json")
    assert "linear.weight" not in report["dropped_weights"] and report["lsg"]["attention_kernel"] == "portable"


# What is left out


def add_files(folder):
    """What a repository may have beside a model: pickles are not opened, so anything can stand in them."""
    for name in (
        ".gitattributes", "onnx/model.onnx", "onnx/a/b.json", "openvino/x.xml", "pytorch_model.bin", "tf_model.h5",
        "flax_model.msgpack", "imgs/a.png", "train.py", "data_config.json", "sparse_linear.pt", "colbert_linear.pt",
        "optimizer.pt", "LICENCE.txt", "NOTICE",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_what_is_left_out_is_named(source, hub, tmp_path, capsys, on_the_hub):
    add_files(source)
    name = hub(source) if on_the_hub else source
    assert run_command(name, tmp_path / "lsg", *LONG) == 0
    others = "weights in other formats: flax_model.msgpack, onnx/, openvino/, pytorch_model.bin, tf_model.h5"
    heads = ["colbert_linear.pt", "sparse_linear.pt"]
    plain = ["data_config.json", "imgs/", "optimizer.pt", "train.py"]
    expected = [*sorted([*plain, *heads]), others]
    report = read(tmp_path / "lsg" / "lsg_conversion.json")
    assert report["left_out"] == expected and not report["warnings"]
    assert f"not copied    {', '.join(expected)}\n" in capsys.readouterr().out
    card = (tmp_path / "lsg" / "README.md").read_text()
    assert f"- Files of the source that were left out: {', '.join(expected)}\n" in card
    assert (tmp_path / "lsg" / "LICENCE.txt").exists() and (tmp_path / "lsg" / "NOTICE").exists()
    assert run_command(name, tmp_path / "with", *LONG, "--allow_pickle", "--quiet") == 0
    assert read(tmp_path / "with" / "lsg_conversion.json")["left_out"] == [*plain, others]
    assert all((tmp_path / "with" / head).read_text() == "{}" for head in heads)


def test_weights_that_are_new_or_left_out_stand_in_the_card(source, tmp_path):
    add_projection(source)
    change(source / "config.json", architectures=["BertModel"])
    flags = ("--architecture", "BertForSequenceClassification", "--quiet", "--no_verify")
    assert run_command(source, tmp_path / "lsg", *flags) == 0
    card = (tmp_path / "lsg" / "README.md").read_text()
    assert "- New weights, untrained: classifier.bias, classifier.weight\n" in card
    assert "- Weights of the source that were left out: linear.weight\n" in card


def test_files_of_every_tokenizer_come_from_the_hub(source, hub, tmp_path, monkeypatch):
    names = {*TOKENIZER_FILES, "bpe.codes", "spm.model", "tokenizer.model"}
    for name in names:
        (source / name).write_text("{}")
    options = ConversionOptions(initial_model=hub(source), model_name=str(tmp_path / "lsg"))
    folder, _ = locate(options)
    assert names <= {path.name for path in folder.iterdir()}


def test_a_tokenizer_that_cannot_be_read_is_not_left_out(source, tmp_path, capsys):
    """Whatever its files are called, it is no source without a tokenizer."""
    for path in (*source.glob("*token*"), *source.glob("vocab*")):
        path.unlink()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "CamembertTokenizer"}')
    (source / "sentencepiece.bpe.model").write_bytes(b"no model")
    assert run_command(source, tmp_path / "lsg") == 3
    assert "the tokenizer of" in capsys.readouterr().err


def test_a_hub_that_lists_no_files(source, hub, tmp_path, capsys):
    add_files(source)
    assert run_command(hub(source, listed=False), tmp_path / "lsg", *LONG, "--no_verify") == 0
    said = capsys.readouterr().out
    assert "the Hub did not list the files of the source" in said and "not copied    data_config.json\n" in said


def test_python_says_what_is_not_returned(source):
    add_dense(source)
    change(source / "config.json", architectures=["BertForSequenceClassification"])
    (source / "2_Dense" / "pytorch_model.bin").rename(source / "2_Dense" / "unused")
    save_file({"linear.weight": torch.zeros(8, 16)}, source / "2_Dense" / "model.safetensors")
    converter = LSGConverter(max_sequence_length=400)
    with pytest.warns(UserWarning) as caught:
        converter.convert_from_pretrained(str(source), architecture="BertForMaskedLM", no_verify=True)
    lines = [str(item.message).removeprefix(f"{source}: ") for item in caught if item.filename == __file__]
    assert lines == [
        "the last 112 of the source's 512 positions are lost",
        "weights of the source that were left out: bert.pooler.dense.bias, bert.pooler.dense.weight, "
        "cls.seq_relationship.bias, cls.seq_relationship.weight",
        "the source's modules of sentence-transformers are not part of what is returned; "
        "lsg_converter.convert writes a folder with them, which SentenceTransformer loads",
    ]
    assert converter.report.left_out == ["2_Dense/unused"]
