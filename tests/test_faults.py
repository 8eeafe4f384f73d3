"""What a user can get wrong: each gives one line and an exit code, and leaves nothing behind."""

import importlib
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Golden, run_command
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from lsg_converter.target import LOCK


ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(bert, tmp_path):
    """A copy of the recorded source that a test may change."""
    shutil.copytree(bert.source, tmp_path / "source")
    return tmp_path / "source"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def config(**changes):
    def change(folder):
        content = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def weights(change):
    def apply(folder):
        path = folder / "model.safetensors"
        state = change(load_file(path))
        save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})

    return apply


def weight(name, change):
    return weights(lambda state: {key: change(value) if name in key else value for key, value in state.items()})


def without(name):
    return weights(lambda state: {key: value for key, value in state.items() if name not in key})


def data(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def set_nan(value):
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


def header(change):
    """Change the header of the safetensors file."""

    def apply(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        content = change(json.loads(raw[8 : 8 + size]))
        text = json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return apply


def overlap(content):
    first, second = [name for name in content if name != "__metadata__"][:2]
    content[second]["data_offsets"] = content[first]["data_offsets"]
    return content


def shuffle(content):
    names = [name for name in content if name != "__metadata__"]
    offsets = [content[name]["data_offsets"] for name in names]
    for name, other in zip(names, offsets[1:] + offsets[:1], strict=True):
        content[name]["data_offsets"] = other
    return content


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def same(index):
    return index


def shard(folder, change=same):
    """Two shards and their index instead of one file."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(change(index)))


def sharded(change=same, *more):
    return lambda folder: [shard(folder, change), *[step(folder) for step in more]]


def pointing(place):
    def change(index):
        return {**index, "weight_map": dict.fromkeys(index["weight_map"], place)}

    return sharded(change)


def swapped(index):
    other = {FIRST: SECOND, SECOND: FIRST}
    return {**index, "weight_map": {key: other[file] for key, file in index["weight_map"].items()}}


def twice(folder):
    """A weight of the first shard in the second too."""
    first, second = load_file(folder / FIRST), load_file(folder / SECOND)
    name = min(first)
    save_file({**second, name: first[name]}, folder / SECOND, metadata={"format": "pt"})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


SOURCES = [
    (empty, "has no config.json"),
    (remove("config.json"), "has no config.json"),
    (data("config.json", lambda raw: raw[:50]), "config.json: it is no JSON"),
    (data("config.json", lambda raw: b""), "config.json: it is no JSON"),
    (data("config.json", lambda raw: b"\xff\xfe\x00"), "config.json: it is no JSON"),
    (data("config.json", lambda raw: b"[" * 100_000), "config.json: it is no JSON"),
    (data("config.json", lambda raw: b"[1]"), "config.json: it must hold an object"),
    (config(model_type=...), "names no model_type; give --model_type one of albert, bart, bert"),
    (config(model_type=7), "has 7 as its model_type; give --model_type one of albert, bart, bert"),
    (config(model_type="gpt2"), "'gpt2' cannot be converted; give a model of one of these: albert, bart, bert"),
    (config(architectures=["GPT2LMHeadModel"]), "the class 'GPT2LMHeadModel', which the family 'bert' lacks; give"),
    (config(architectures=[]), "names no architecture; give --architecture one of BertModel"),
    (config(hidden_act="wish"), "config.json of"),
    (config(vocab_size=-1), "config.json of"),
    (config(num_hidden_layers=5), "lacks weights: bert.encoder.layer.2"),
    (config(num_hidden_layers=1), "has weights that BertForPreTraining lacks: bert.encoder.layer.1"),
    (config(quantization_config={"quant_method": "bitsandbytes"}), "is quantized"),
    (config(architectures="BertModel"), "has 'BertModel' as its architectures; correct it to a list"),
    (config(pad_token_id=500), "pad_token_id is 500, which is not among its 120 tokens; correct it to the id"),
    (config(pad_token_id=-121), "pad_token_id is -121, which is not among its 120 tokens"),
    (config(pad_token_id="1"), "Field 'pad_token_id' with value '1' doesn't match any type in (int, NoneType); "),
    (config(hidden_size="16"), "Field 'hidden_size' expected int"),
    (config(hidden_size=24), "has the shape (16,), and by config.json it has (24,)"),
    (config(num_attention_heads=3), "config.json of"),
    (config(position_embedding_type="relative_key"), "LSG has no relative positions"),
    (without("seq_relationship"), "lacks weights: cls.seq_relationship"),
    (config(max_position_embeddings=0), "max_position_embeddings is 0; correct it to at least 1"),
    (config(max_position_embeddings=-5), "max_position_embeddings"),
    (config(vocab_size=60), "has the shape (120, 16), and by config.json it has (60, 16)"),
    (data("model.safetensors", lambda raw: b""), "model.safetensors: it cannot be read: it is cut off: it has 0 bytes"),
    (data("model.safetensors", lambda raw: raw[:-1]), "it is cut off: it has 64,127 bytes of 64,128; copy or download"),
    (data("model.safetensors", lambda raw: raw[:99]), "it is cut off: it has 99 bytes of more than 4,824; copy"),
    (data("model.safetensors", lambda raw: raw[:4]), "it is cut off: it has 4 bytes"),
    (data("model.safetensors", lambda raw: struct.pack("<Q", 2**40) + raw[8:]), "it is no safetensors file; copy"),
    (data("model.safetensors", lambda raw: raw[:8] + b"x" + raw[9:]), "model.safetensors: it cannot be read"),
    (data("model.safetensors", lambda raw: b"version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
    (header(overlap), "model.safetensors: it cannot be read"),
    (header(shuffle), "model.safetensors: it cannot be read"),
    (weight("pooler.dense.weight", set_nan), "the weight bert.pooler.dense.weight has values that are not finite"),
    (weight("word_embeddings", lambda value: value / 0), "word_embeddings.weight has values that are not finite"),
    (weight("pooler.dense.weight", lambda value: value[:, :8]), "has the shape (16, 8), and by config.json"),
    (without("layer.1.output.dense.weight"), "lacks weights: bert.encoder.layer.1.output.dense.weight"),
    (without("word_embeddings"), "lacks weights"),
    (without("position_embeddings"), "lacks weights: bert.embeddings.position_embeddings.weight"),
    (remove("model.safetensors"), "has no weights, such as model.safetensors"),
    (pickled, "its weights are pickled: --allow_pickle loads them"),
    (sharded(swapped), "which lacks it"),
    (sharded(lambda index: {"metadata": {}}), "has no weight_map"),
    (sharded(lambda index: {**index, "weight_map": []}), "has no weight_map"),
    (sharded(lambda index: {"weight_map": index["weight_map"]}), "has no metadata"),
    (sharded(lambda index: {**index, "weight_map": {}}), "has no weight_map"),
    (sharded(lambda index: {**index, "weight_map": {"a": 3}}), "it names 3"),
    (sharded(same, remove(SECOND)), "'model-00002-of-00002.safetensors', which is not there"),
    (sharded(same, data("model.safetensors.index.json", lambda raw: raw[:40])), "index.json: it is no JSON"),
    (sharded(same, data(SECOND, lambda raw: raw[:900])), "00002-of-00002.safetensors: it cannot be read"),
    (sharded(same, twice), "is in model-00001-of-00002.safetensors too; remove one of them"),
    (pointing("../outside.safetensors"), "it names '../outside.safetensors'"),
    (pointing("/etc/model.safetensors"), "it names '/etc/model.safetensors'"),
    (pointing("sub/model.safetensors"), "it names 'sub/model.safetensors'"),
    (pointing("model.bin"), "it names 'model.bin'"),
    (data("tokenizer.json", lambda raw: raw[:99]), "source/tokenizer.json: it is no JSON: "),
    (data("tokenizer_config.json", lambda raw: b"{"), "source/tokenizer_config.json: it is no JSON: "),
    (data("tokenizer.json", lambda raw: b"{}"), "the tokenizer of"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(SOURCES)))
def test_sources(source, tmp_path, capsys, case):
    fault, message = SOURCES[case]
    fault(source)
    before = content_of(source)
    assert run_command(source, tmp_path / "lsg") == 3
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and not output.out
    assert message in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and content_of(source) == before


OPTIONS = [
    (["--max_sequence_length", "0"], "--max_sequence_length: got 0"),
    (["--max_sequence_length", "-4096"], "--max_sequence_length: got -4096"),
    (["--max_sequence_length", "4k"], "--max_sequence_length: got '4k'; give a whole number"),
    (["--max_sequence_length", "4096.5"], "--max_sequence_length: got '4096.5'; give a whole number"),
    (["--max_sequence_length", "1000000000"], "the positions alone would take 64,000,000,000 bytes"),
    (["--max_sequence_length"], "--max_sequence_length: got no value; give one after it"),
    (["--no_use_token_ids=3"], "--no_use_token_ids: it takes no value"),
    (["--overwrite=perhaps"], "--overwrite: got 'perhaps'; give true or false"),
    (["--quiet=perhaps"], "--quiet: got 'perhaps'; give true or false"),
    (["--architecture", "BertForEverything"], "has BertModel, "),
    (["--architecture", "RobertaForMaskedLM"], "the family 'bert' has BertModel, "),
    (["--architecture", ""], "--architecture: got an empty string; give a value, or leave it out"),
    (["--model_name", ""], "--model_name: got an empty string; give the folder to write"),
    (["--model_type", "gpt2"], "--model_type: got 'gpt2'; give one of albert, bart, bert"),
    (["--revision", "main"], "--revision: got it with the folder"),
    (["--dtype", "int8"], "--dtype: got 'int8'; give one of auto, float32"),
    (["--position_init", "random"], "--position_init: got 'random'; give one of tile"),
    (["--global_positional_stride", "0"], "--global_positional_stride: got 0"),
    (["--global_positional_stride", "7"], "--global_positional_stride: got 7"),
    (["--resize_lsg"], "is no LSG checkpoint"),
    (["--keep_first_global_token"], "is no LSG checkpoint"),
    (["--rebuild_global_tokens"], "is no LSG checkpoint"),
    (["--resize_lsg", "--rebuild_global_tokens"], "--resize_lsg: got --rebuild_global_tokens as well"),
    (["--private"], "--private: got it without --push_to_hub"),
    (["--hub_model_id", "me/it"], "--hub_model_id: got it without --push_to_hub"),
    (["--no_verify", "--run_test"], "--no_verify: got --run_test as well"),
    (["--overwrit"], "--overwrit: no such option; did you mean --overwrite?"),
    (["--max_seq_length", "3"], "--max_seq_length: no such option; did you mean --max_sequence_length?"),
    (["stray"], "stray: it follows no flag; put one such as --initial_model before it"),
    (["--seed", "x"], "--seed: got 'x'; give a whole number"),
    (["--seed", "-1"], "--seed: got -1"),
    (["--seed", str(2**70)], "--seed: got 1180591620717411303424"),
    (["--model_kwargs", "{'block_size': 64"], "--model_kwargs: got"),
    (["--model_kwargs", "{'block_size': 32 * 2}"], "literals"),
    (["--model_kwargs", "{'block_size': __import__('os').getpid()}"], "literals"),
    (["--model_kwargs", "dict(block_size=64)"], "literals"),
    (["--model_kwargs", "['block_size']"], "literals"),
    (["--model_kwargs", "{1: 2}"], "literals"),
    (["--model_kwargs", "{'blocksize': 64}"], "unknown field 'blocksize'; did you mean 'block_size'"),
    (["--model_kwargs", "{'hidden_size': 64}"], "unknown field 'hidden_size'; "),
    (["--model_kwargs", "{'block_size': 0}"], "block_size: got 0"),
    (["--model_kwargs", "{'block_size': -128}"], "block_size: got -128"),
    (["--model_kwargs", "{'block_size': '128'}"], "--model_kwargs: block_size: got '128'; give a whole number"),
    (["--model_kwargs", "{'block_size': 128.0}"], "block_size: got 128.0; give a whole number"),
    (["--model_kwargs", "{'block_size': None}"], "block_size: got None; give a whole number"),
    (["--model_kwargs", "{'block_size': 100, 'sparsity_factor': 3}"], "a multiple of sparsity_factor, 3"),
    (["--model_kwargs", "{'sparse_block_size': -1}"], "sparse_block_size: got -1"),
    (["--model_kwargs", "{'sparse_block_size': 48}"], "sparse_block_size: got 48; allowed is 32 or 64, nearest to it"),
    (["--model_kwargs", "{'sparse_block_size': 1}"], "sparse_block_size: got 1; allowed is 2, nearest to it"),
    (["--model_kwargs", "{'sparsity_factor': -1}"], "sparsity_factor: got -1"),
    (["--model_kwargs", "{'sparsity_factor': 256}"], "sparsity_factor: got 256"),
    (["--model_kwargs", "{'sparsity_type': 'best'}"], "allowed is one of none, norm"),
    (["--model_kwargs", "{'num_global_tokens': 513}"], "num_global_tokens: got 513; allowed is 0 to 512"),
    (["--model_kwargs", "{'num_global_tokens': -1}"], "num_global_tokens: got -1"),
    (["--model_kwargs", "{'mask_first_token': True, 'pool_with_global': False}"], "mask_first_token: got True"),
    (["--model_kwargs", "{'lsh_num_pre_rounds': -1}"], "lsh_num_pre_rounds: got -1"),
    (["--model_kwargs", "{'adaptive': 'yes'}"], "adaptive: got 'yes'; give true or false"),
    (["--model_kwargs", "{'sparsity_type': 3}"], "sparsity_type: got 3; give a text or none"),
]


@pytest.mark.parametrize(
    ("flags", "message"), OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_options(bert, tmp_path, capsys, flags, message):
    assert run_command(bert.source, tmp_path / "lsg", *flags) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: --") or "stray" in output.err
    assert output.err.count("\n") == 1 and not output.out
    assert message in output.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no/such", 3, "is no folder here, and the Hub gave no such model"),
        ("no/such", 3, "it was not reached, and the cache lacks the model; check the connection"),
        (
            "/no/such/folder",
            3,
            "there is no folder '/no/such/folder', and no model on the Hub has such a name; correct",
        ),
        ("such/folder/", 3, "there is no folder 'such/folder/'"),
        ("a name with spaces", 3, "there is no folder"),
        ("..", 3, "has no config.json"),
        (
            "",
            2,
            "--initial_model: got an empty string; give the model to convert: a name on the Hugging Face Hub, or a",
        ),
    ],
)
def test_names(tmp_path, capsys, name, code, message):
    assert run_command(name, tmp_path / "lsg") == code
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (GatedRepoError, 403, "its owner grants access; ask for it on its page, and log in"),
        (RepositoryNotFoundError, 404, "it has none of that name, or a private one; correct the name"),
        (RevisionNotFoundError, 404, "it has no such revision of it; correct --revision"),
        (HfHubHTTPError, 500, "what the server said; check the name, the connection and your access"),
    ],
)
def test_what_the_hub_refuses(tmp_path, capsys, monkeypatch, kind, status, message):
    def refuse(*_, **__):
        raise kind("what the server said", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr("lsg_converter.source.snapshot_download", refuse)
    assert run_command("me/model", tmp_path / "lsg") == 3
    error = capsys.readouterr().err
    assert f"'me/model' is no folder here, and the Hub gave no such model: {message}" in error


def test_a_source_that_is_a_file(source, tmp_path, capsys):
    assert run_command(source / "config.json", tmp_path / "lsg") == 3
    assert "config.json' is a file; give the folder that a model was saved to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "padding", "message"),
    [
        ("roberta", None, "pad_token_id is null, and a roberta counts its positions from it; correct it to the id of"),
        ("camembert", -1, "pad_token_id is -1, which is not among its 120 tokens; correct it to the id of"),
        ("xlm_roberta", 120, "pad_token_id is 120, which is not among its 120 tokens; correct it to the id of"),
        ("bart", 120, "pad_token_id is 120, which is not among its 120 tokens; correct it to the id of"),
    ],
)
def test_padding_ids_that_no_model_can_have(tmp_path, capsys, family, padding, message):
    shutil.copytree(Golden(family).source, tmp_path / "source")
    config(pad_token_id=padding)(tmp_path / "source")
    assert run_command(tmp_path / "source", tmp_path / "lsg") == 3
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "lsg").exists()


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_source_without_a_padding_id(tmp_path, family):
    """Where positions do not follow it, a stock model needs none."""
    shutil.copytree(Golden(family).source, tmp_path / "source")
    config(pad_token_id=None)(tmp_path / "source")
    assert run_command(tmp_path / "source", tmp_path / "lsg", "--quiet") == 0


@pytest.mark.parametrize("fault", [weight("global_embeddings", lambda value: value[:64]), without("global_embeddings")])
def test_a_global_table_that_is_rebuilt_may_be_short(source, tmp_path, capsys, fault):
    assert run_command(source, tmp_path / "lsg", "--quiet") == 0
    assert run_command(tmp_path / "lsg", tmp_path / "expected", "--rebuild_global_tokens", "--quiet") == 0
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    fault(tmp_path / "lsg")
    assert run_command(tmp_path / "lsg", tmp_path / "kept", "--resize_lsg") == 3
    assert "global_embeddings" in capsys.readouterr().err
    assert run_command(tmp_path / "lsg", tmp_path / "rebuilt", "--rebuild_global_tokens") == 0
    assert "new weights" not in capsys.readouterr().out
    rebuilt = load_file(tmp_path / "rebuilt" / "model.safetensors")
    assert expected.keys() == rebuilt.keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in expected.items())


# Files of options


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"max_sequence_length": ', "neither JSON nor YAML"),
        ("a.json", "[1, 2]", "must hold options"),
        ("a.json", '{"max_sequence_lenght": 1}', "did you mean --max_sequence_length?"),
        ("a.json", '{"max_sequence_length": "many"}', "--max_sequence_length: got 'many'; give a whole number"),
        ("a.json", '{"model_name": "--x", "seed": -1}', "--seed: got -1"),
        ("a.yaml", "a: [", "neither JSON nor YAML"),
        ("absent.yaml", None, "No such file"),
    ],
)
def test_files_of_options(bert, tmp_path, capsys, name, text, message):
    from lsg_converter import cli

    if text is not None:
        (tmp_path / name).write_text(text)
    flags = ["--initial_model", str(bert.source), "--model_name", str(tmp_path / "lsg")]
    assert cli.main([str(tmp_path / name), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "lsg").exists()


# Targets


@pytest.fixture
def checkpoint(bert, tmp_path):
    """A target that exists and is a model."""
    assert run_command(bert.source, tmp_path / "lsg", "--quiet", "--no_verify", "--seed", "5") == 0
    return tmp_path / "lsg"


def holding(*names):
    """A folder with a configuration, and these files and folders."""

    def make(path):
        for name in ("config.json", *names):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).mkdir() if name.endswith("/") else (path / name).write_text("{}")

    return make


def with_links(path):
    holding("model.safetensors")(path)
    (path / "vocab.txt").symlink_to("nowhere")
    (path / "1_Pooling").symlink_to("nowhere")


TARGETS = [
    (lambda path: path.write_text("mine"), "is a file; give another name"),
    (lambda path: path.symlink_to("nowhere"), "is a link; give another name"),
    (lambda path: path.mkdir(), "is an empty folder; remove it, or give another name"),
    (holding("src/app.js", "package.json", "README.md"), "holds package.json, src/, which no conversion writes; "),
    (holding("checkpoint-500/config.json", "model.safetensors", "runs/"), "holds checkpoint-500/, runs/, which"),
    (
        holding("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
        "holds optimizer.pt, rng_state.pth, scheduler.pt and 1 more, which no conversion writes",
    ),
    (holding("training_args.bin"), "holds training_args.bin, which"),
    (holding(".git/HEAD"), "holds .git/, which"),
    (holding("1_Pooling/config.json", "1_Pooling/notes.txt", "2_Normalize/"), "holds 1_Pooling/notes.txt, which"),
    (holding("modeling_mine.py"), "holds modeling_mine.py, which"),
    (holding("lsg_conversion.json", "LICENSE"), "holds LICENSE, which"),
    (with_links, "holds 1_Pooling, vocab.txt, which"),
    (lambda path: [holding("vocab.txt")(path), (path / "config.json").unlink()], "it has no config.json"),
]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize(("make", "message"), TARGETS)
def test_targets(source, tmp_path, capsys, make, message, flags):
    make(tmp_path / "lsg")
    before = content_of(tmp_path)
    assert run_command(source, tmp_path / "lsg", *flags) == 4
    output = capsys.readouterr().err
    assert message in output and output.count("\n") == 1
    assert content_of(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]


def test_a_link_to_the_source(source, tmp_path, capsys):
    (tmp_path / "lsg").symlink_to("source")
    assert run_command(source, tmp_path / "lsg", "--overwrite") == 4
    assert "is the source" in capsys.readouterr().err


def test_an_existing_checkpoint_is_replaced_on_request_alone(source, checkpoint, capsys):
    before = content_of(checkpoint)
    assert run_command(source, checkpoint) == 4
    assert "exists; give another name, or --overwrite to replace it" in capsys.readouterr().err
    assert content_of(checkpoint) == before


def test_a_target_whose_name_is_too_long(source, tmp_path, capsys):
    assert run_command(source, tmp_path / ("x" * 300)) == 4
    assert "cannot be written: File name too long" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("place", [".", "inner", "..", "/proc/lsg", "config.json/lsg"])
def test_targets_at_the_source(source, capsys, place):
    before = content_of(source)
    for flags in ([], ["--overwrite"]):
        assert run_command(source, source / place, *flags) == 4
        assert capsys.readouterr().err.count("\n") == 1
    assert content_of(source) == before


@pytest.mark.parametrize("exchanges", [True, False])
def test_overwrite_replaces_a_checkpoint_when_the_new_one_is_complete(
    source, checkpoint, tmp_path, monkeypatch, exchanges
):
    if not exchanges:  # as where the system cannot
        monkeypatch.setattr("lsg_converter.target.exchange", lambda *_: False)
    assert run_command(source, checkpoint, "--overwrite", "--quiet", "--max_sequence_length", "600") == 0
    assert json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"] == 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_overwrite_is_one_step(source, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", None)  # of two renames the first would leave nothing at the target
    assert run_command(source, checkpoint, "--overwrite", "--quiet", "--no_verify") == 0
    assert "seed" not in json.loads((checkpoint / "lsg_conversion.json").read_text())["options"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]


@pytest.mark.parametrize("family", ["bert", "mbart"])
def test_overwrite_replaces_what_save_pretrained_and_a_report_name(tmp_path, family):
    """A licence is named by the report of the conversion that copied it."""
    shutil.copytree(Golden(family).source, tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("free")
    assert run_command(tmp_path / "source", tmp_path / "lsg", "--quiet", "--no_verify") == 0
    AutoModel.from_pretrained(tmp_path / "lsg", trust_remote_code=True).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "lsg").save_pretrained(tmp_path / "saved")
    for name in ("lsg", "saved"):
        assert run_command(tmp_path / "source", tmp_path / name, "--overwrite", "--quiet", "--no_verify") == 0
        assert (tmp_path / name / "LICENSE").read_text() == "free"


def test_overwrite_replaces_what_sentence_transformers_saves(source, tmp_path):
    from sentence_transformers import SentenceTransformer, models

    modules = models.Transformer(str(source)), models.Pooling(16), models.Dense(16, 8), models.Normalize()
    SentenceTransformer(modules=modules).save(str(tmp_path / "lsg"))
    assert (tmp_path / "lsg" / "2_Dense" / "model.safetensors").is_file()
    assert run_command(source, tmp_path / "lsg", "--overwrite", "--quiet", "--no_verify") == 0
    assert (tmp_path / "lsg" / "lsg_conversion.json").is_file()


def test_what_comes_into_the_target_meanwhile_stays(source, checkpoint, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("lsg_converter.conversion")
    write = module.write_card

    def write_and_train(*arguments):
        write(*arguments)
        (checkpoint / "checkpoint-500").mkdir()

    monkeypatch.setattr(module, "write_card", write_and_train)
    before = content_of(checkpoint)
    assert run_command(source, checkpoint, "--overwrite", "--no_verify") == 4
    assert "holds checkpoint-500/, which" in capsys.readouterr().err
    assert content_of(checkpoint) == before and (checkpoint / "checkpoint-500").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(source, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run_command(source, tmp_path / "lsg", "--quiet", "--no_verify") == 0
    finally:
        os.umask(before)
    assert (tmp_path / "lsg" / "model.safetensors").is_file()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "lsg").rglob("*")}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert stat.S_IMODE((tmp_path / "lsg").stat().st_mode) == 0o777 & ~umask


def test_a_failed_overwrite_leaves_what_was_there(source, checkpoint, tmp_path, monkeypatch):
    before = content_of(checkpoint)
    monkeypatch.setattr("lsg_converter.verify.finite_output", lambda *_: 1 / 0)
    assert run_command(source, checkpoint, "--overwrite") == 1
    assert content_of(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]


# Interruptions


def command(source, target, *flags):
    script = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--quiet"]
    return [*script, "--initial_model", str(source), "--model_name", str(target), *flags]


def start(source, target, *flags):
    """The command in a process of its own, once it has begun to write."""
    arguments = command(source, target, "--run_test", *flags)
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": ""}, stderr=subprocess.PIPE, text=True)
    while not list(target.parent.glob(".lsg-*/lsg/config.json")) and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.newest
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.full),
    ],
)
def test_interrupted(source, checkpoint, tmp_path, number, code):
    before = content_of(checkpoint)
    process = start(source, checkpoint, "--overwrite")
    if number == signal.SIGKILL:  # what is in use stays
        assert run_command(source, tmp_path / "other", "--quiet", "--no_verify") == 0
        assert process.poll() is None and list(tmp_path.glob(".lsg-*/lsg/config.json"))
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert content_of(checkpoint) == before
    if number != signal.SIGKILL:
        assert error == "error: interrupted; nothing is left half-written\n" and not list(tmp_path.glob(".lsg-*"))
        return
    assert list(tmp_path.glob(".lsg-*"))  # until the next conversion
    assert run_command(source, tmp_path / "another", "--quiet", "--no_verify") == 0
    assert not list(tmp_path.glob(".lsg-*"))


@pytest.mark.newest
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which signals are caught")
@pytest.mark.parametrize(
    ("number", "code", "program"),
    [
        (signal.SIGINT, 130, [str(ROOT / "convert_checkpoint.py")]),
        pytest.param(signal.SIGTERM, 143, ["-m", "lsg_converter"], marks=pytest.mark.full),
    ],
)
def test_interrupted_while_it_starts(source, tmp_path, number, code, program):
    flags = ["--initial_model", str(source), "--model_name", str(tmp_path / "lsg"), "--run_test"]
    for seconds in (0, 0.05, 0.1, 0.2, 0.5, 1):
        process = subprocess.Popen([sys.executable, *program, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until_caught(process.pid, signal.SIGTERM)
        time.sleep(seconds)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code, (seconds, error)
        assert error == "error: interrupted; nothing is left half-written\n"
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def wait_until_caught(pid, number):
    while True:
        (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        if int(caught, 16) >> number - 1 & 1:
            return
        time.sleep(0.001)


@pytest.mark.full
def test_an_interrupt_that_is_ignored_stays_so(source, tmp_path):
    """As under nohup, or in the background of a script."""
    process = subprocess.Popen(
        command(source, tmp_path / "lsg", "--dry_run"), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_what_is_no_stage_or_may_be_in_use_stays(source, tmp_path):
    notes, begun = tmp_path / ".lsg-notes", tmp_path / ".lsg-begun"
    notes.mkdir()
    (notes / "lock").write_text("mine")
    begun.mkdir()
    (begun / LOCK).touch()
    for name in ("one", "two"):
        assert run_command(source, tmp_path / name, "--quiet", "--no_verify") == 0
        assert (notes / "lock").read_text() == "mine" and begun.exists() is (name == "one")
        os.utime(begun, (0, 0)) if name == "one" else None


def test_what_a_kill_in_the_last_step_took_away_comes_back(source, checkpoint, tmp_path):
    """Killed between the two renames of --overwrite: the old checkpoint is in the stage, the new one not in place."""
    before = content_of(checkpoint)
    stage = tmp_path / ".lsg-killed"
    (stage / "before").mkdir(parents=True)
    checkpoint.rename(stage / "before" / "lsg")
    (stage / LOCK).touch()
    assert run_command(source, tmp_path / "other", "--quiet", "--no_verify") == 0
    assert content_of(checkpoint) == before and not list(tmp_path.glob(".lsg-*"))


@pytest.mark.newest
@pytest.mark.full
def test_run_twice_at_once(source, tmp_path):
    processes = [
        subprocess.Popen(command(source, tmp_path / "lsg"), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 4], errors
    assert any("--model_name" in error for error in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]
    assert run_command(tmp_path / "lsg", tmp_path / "again", "--resize_lsg", "--quiet") == 0


@pytest.mark.newest
def test_out_of_disk(source, checkpoint, tmp_path):
    """A limit on the size of files stands for a full disk."""
    before = content_of(checkpoint)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from lsg_converter import cli; sys.exit(cli.main())"
    )
    flags = command(source, checkpoint, "--overwrite")[2:]
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 4 and result.stderr.count("\n") == 1
    assert "--model_name" in result.stderr and "cannot be written" in result.stderr
    assert content_of(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lsg", "source"]
