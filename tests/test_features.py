"""The command's options: what each does, seen in what it writes and prints."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from lsg_converter import ConversionOptions, cli, convert
from lsg_converter.options import OptionError


ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(bert, tmp_path):
    shutil.copytree(bert.source, tmp_path / "source")
    return tmp_path / "source"


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_code(code, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


# One definition: flags, files, arguments


def test_flags_files_and_arguments_are_one(source, tmp_path):
    options = {
        "max_sequence_length": 700, "architecture": "BertForMaskedLM", "random_global_init": True, "seed": 3,
        "model_kwargs": {"block_size": 64, "sparsity_type": "stride"}, "no_verify": True,
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({**options, "initial_model": str(source), "model_name": "unused"}))
    (tmp_path / "a.yaml").write_text("".join(f"{k}: {v}\n" for k, v in options.items()))
    flags = [part for k, v in options.items() for part in (f"--{k}", str(v))]
    places = [tmp_path / name / "lsg" for name in ("flags", "json", "yaml", "python")]
    assert run_command(source, places[0], *flags) == 0
    assert cli.main([str(tmp_path / "a.json"), "--model_name", str(places[1])]) == 0
    assert cli.main([str(tmp_path / "a.yaml"), "--initial_model", str(source), "--model_name", str(places[2])]) == 0
    convert(ConversionOptions(initial_model=str(source), model_name=str(places[3]), **options))
    contents = [content_of(place) for place in places]
    # Two conversions of one source with one seed give equal bytes, in every file.
    assert all(content == contents[0] for content in contents) and len(contents[0]) > 9


def test_arguments_of_a_wrong_type():
    for name, value in (("max_sequence_length", "4096"), ("run_test", 1), ("seed", True), ("token", 7), ("dtype", 3)):
        with pytest.raises(OptionError, match=f"--{name}: got "):
            ConversionOptions(**{"initial_model": "a", "model_name": "b", name: value})


def test_a_token_is_shown_nowhere(source, tmp_path, capsys):
    secret = "hf_aVerySecretToken"
    assert secret not in repr(ConversionOptions(initial_model="a", model_name="b", token=secret))
    for flag in ("--token", "--use_auth_token"):
        assert run_command("no/such", tmp_path / "a", flag, secret, "--debug") == 3
        assert run_command(source, tmp_path / flag / "lsg", flag, secret, "--no_verify", "--json") == 0
        output = capsys.readouterr()
        assert secret not in output.out + output.err
        assert not any(secret.encode() in data for data in content_of(tmp_path / flag / "lsg").values())
    assert run_command(source, tmp_path / "b", "--no_verify", "--use_auth_token") == 0


# What is printed


def test_quiet(source, tmp_path, capsys):
    assert run_command(source, tmp_path / "lsg", "--quiet") == 0
    output = capsys.readouterr()
    assert not output.out and not output.err


def test_json(source, tmp_path, capsys):
    assert run_command(source, tmp_path / "lsg", "--json", "--model_kwargs", "{'num_global_tokens': 0}") == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert not output.err
    assert report["architecture"] == "LSGBertForPreTraining" and report["source_positions"] == 512
    name = "256 tokens give what the source gives"
    assert {"name": name, "figure": "to the bit", "seconds": None} in report["checks"]
    written = json.loads((tmp_path / "lsg" / "lsg_conversion.json").read_text())
    for name, digest in written["files"].items():
        assert hashlib.sha256((tmp_path / "lsg" / name).read_bytes()).hexdigest() == digest
    assert set(written["files"]) == set(content_of(tmp_path / "lsg")) - {"lsg_conversion.json"}
    weights = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert written["source_files"]["model.safetensors"] == weights
    assert written["versions"].keys() == {"lsg-converter", "transformers", "torch", "safetensors"}
    assert str(tmp_path) not in json.dumps(written)


def test_dry_run_reads_the_configuration_alone(source, tmp_path, capsys):
    (source / "model.safetensors").unlink()
    (source / "tokenizer.json").unlink()
    assert run_command(source, tmp_path / "lsg", "--dry_run", "--max_sequence_length", "900") == 0
    text = capsys.readouterr().out
    assert "would become  LSGBertForPreTraining, 900 positions" in text and "nothing was written" in text
    assert "would change  positions: the 512 trained rows, repeated to 900" in text
    assert not (tmp_path / "lsg").exists()
    # It says what could not be, too.
    assert run_command(source, source, "--dry_run") == 4
    assert run_command(source, tmp_path / "lsg", "--dry_run", "--model_kwargs", "{'block_size': 0}") == 2


def test_no_verify(source, tmp_path, capsys):
    assert run_command(source, tmp_path / "lsg", "--no_verify") == 0
    assert "verified" not in capsys.readouterr().out
    assert "It was not verified." in (tmp_path / "lsg" / "README.md").read_text()


def test_debug_shows_where(tmp_path, capsys):
    assert run_command(tmp_path, tmp_path / "lsg", "--debug") == 3
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: --initial_model")


def test_an_error_of_ours_is_one_line_too(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lsg_converter.surgery.longer_positions", lambda *_: 1 / 0)
    assert run_command(source, tmp_path / "lsg") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError") and error.count("\n") == 1
    assert not (tmp_path / "lsg").exists()


# What is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(source, tmp_path, dtype):
    assert run_command(source, tmp_path / "lsg", "--dtype", dtype, "--quiet") == 0
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "lsg", source))
    assert {str(value.dtype) for value in written.values()} == {f"torch.{dtype}"}
    name = "bert.pooler.dense.weight"
    assert torch.equal(written[name], original[name].to(written[name].dtype))
    assert json.loads((tmp_path / "lsg" / "config.json").read_text())["dtype"] == dtype


def test_interpolated_positions(source, tmp_path, capsys):
    flags = ["--position_init", "interpolate", "--max_sequence_length", "1023"]
    assert run_command(source, tmp_path / "lsg", *flags, "--model_kwargs", "{'num_global_tokens': 0}") == 0
    assert "rows of embeddings.position_embeddings lie between the source's" in capsys.readouterr().out
    name = "bert.embeddings.position_embeddings.weight"
    written, original = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "lsg", source))
    assert torch.equal(written[::2], original)
    torch.testing.assert_close(written[1::2], (original[1:] + original[:-1]) / 2)


def test_a_family_that_computes_its_positions_cannot_interpolate(tmp_path, capsys):
    source = ROOT / "tests" / "golden" / "pegasus" / "source"
    assert run_command(source, tmp_path / "lsg", "--position_init", "interpolate") == 2
    assert "pegasus computes its positions" in capsys.readouterr().err


def test_a_sentence_model_travels_whole(minilm, lsg_minilm, tmp_path):
    """Pooling and normalisation, the licence, and the vocabulary; and it embeds a long text without another step."""
    assert json.loads((lsg_minilm / "sentence_bert_config.json").read_text())["max_seq_length"] == 4096
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "vocab.txt"):
        assert (lsg_minilm / name).read_bytes() == (Path(minilm) / name).read_bytes()
    card = (lsg_minilm / "README.md").read_text()
    for text in ("license: apache-2.0", "- sentence-similarity", "- lsg", "pipeline_tag: sentence-similarity"):
        assert text in card
    text = "A text that is read to its end. " * 200
    long, stock = (SentenceTransformer(str(p), trust_remote_code=True, device="cpu") for p in (lsg_minilm, minilm))
    assert long.max_seq_length == 4096 and [type(m) for m in long] == [type(m) for m in stock]
    assert abs((long.encode(text) ** 2).sum() - 1) < 1e-5
    assert abs(long.encode(text + "A galaxy.") - long.encode(text + "Bread.")).max() > 1e-4
    # Nothing that the model does not need.
    assert not (lsg_minilm / "data_config.json").exists()


def test_modules_that_name_other_code_stay_behind(source, tmp_path, capsys):
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "custom_st.py").write_text("1 / 0")
    assert run_command(source, tmp_path / "lsg") == 0
    assert "names other code or places" in capsys.readouterr().out
    assert not (tmp_path / "lsg" / "modules.json").exists() and not (tmp_path / "lsg" / "custom_st.py").exists()


def test_labels_a_cross_encoder_and_the_licence_travel(source, tmp_path):
    content = json.loads((source / "config.json").read_text())
    content |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    content |= {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.0"}}
    (source / "config.json").write_text(json.dumps(content))
    (source / "LICENSE").write_text("Do as you like.")
    flags = ["--architecture", "BertForSequenceClassification", "--quiet"]
    assert run_command(source, tmp_path / "lsg", *flags) == 0
    written = json.loads((tmp_path / "lsg" / "config.json").read_text())
    for name in ("id2label", "label2id", "sentence_transformers"):
        assert written[name] == content[name]
    assert (tmp_path / "lsg" / "LICENSE").read_text() == "Do as you like."


def test_the_cards_code_runs(source, tmp_path):
    """With a tokenizer and, in the last, without."""
    architectures = {
        "BertForMultipleChoice": "bert", "BertForQuestionAnswering": "bert", "RobertaModel": "roberta",
        "BartForConditionalGeneration": "bart", "PegasusModel": "pegasus",
    }  # fmt: skip
    for path in source.glob("*token*"):
        path.unlink()
    sources = {name: ROOT / "tests" / "golden" / family / "source" for name, family in architectures.items()}
    whole = ""
    for architecture, folder in [*sources.items(), ("BertForPreTraining", source)]:
        target = tmp_path / f"lsg (é) 漢.v1 {architecture}"
        assert run_command(folder, target, "--architecture", architecture, "--quiet", "--no_verify") == 0
        (code,) = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), re.DOTALL)
        check = "first = outputs if hasattr(outputs, 'isfinite') else outputs[0]\nassert first.isfinite().all()"
        whole += f"{code}\n{check}\n"
    result = run_code(whole, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_card_takes_what_the_source_says_literally(source, tmp_path):
    metadata = {"tags": ["{{ 7 * 7 }}", "a: b\n---\n# c"], "license_name": "{% raw %}'\"", "base_model": "x: [y]"}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n")
    odd = source.rename(tmp_path / "{{ 7 * 7 }} {% for %} {#")
    assert run_command(odd, tmp_path / "{{ lsg }}", "--quiet", "--no_verify") == 0
    card = ModelCard.load(tmp_path / "{{ lsg }}" / "README.md")
    metadata["tags"] += ["lsg", "long-context"]
    assert card.data.to_dict() == {**metadata, "library_name": "transformers"}
    assert card.text.startswith("\n# {{ lsg }}\n") and f"- Source: {odd.name}, bert\n" in card.text


def test_front_matter_that_is_no_yaml_is_left_out(source, tmp_path):
    (source / "README.md").write_text("---\ntags: [a\n---\n")
    assert run_command(source, tmp_path / "lsg", "--quiet", "--no_verify") == 0
    assert ModelCard.load(tmp_path / "lsg" / "README.md").data.tags == ["lsg", "long-context"]


# Odd, but valid


def test_shards_and_odd_names(source, tmp_path, monkeypatch):
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    odd = tmp_path / "wo [1] 'q' \"d\" é漢 %20"
    source.rename(odd)
    monkeypatch.chdir(tmp_path)
    assert run_command(odd.name, "out/ü $HOME #1/lsg", "--quiet") == 0
    written = load_file(tmp_path / "out/ü $HOME #1/lsg" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items() if "position" not in name)


def test_pickled_shards(source, tmp_path):
    state = load_file(source / "model.safetensors")
    weight_map = {name: f"pytorch_model-{place % 2}.bin" for place, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: value for name, value in state.items() if weight_map[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "model.safetensors").unlink()
    assert run_command(source, tmp_path / "lsg", "--allow_pickle", "--quiet") == 0
    written = load_file(tmp_path / "lsg" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items() if "position" not in name)


@pytest.fixture
def cached(source, tmp_path):
    """The source as the Hub's client keeps it: links to blobs, by commit."""
    repository = tmp_path / "cache" / "models--someone--small-bert"
    commit, snapshot = "0123456789abcdef0123456789abcdef01234567", None
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(source.iterdir()):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "cache", commit


def test_a_name_on_the_hub(cached, tmp_path):
    cache, commit = cached
    target = tmp_path / "lsg"
    flags = ["--cache_dir", str(cache), "--revision", "main", "--quiet"]
    assert run_command("someone/small-bert", target, *flags) == 0
    written = json.loads((target / "lsg_conversion.json").read_text())
    assert (written["source"], written["revision"]) == ("someone/small-bert", commit)
    card = (target / "README.md").read_text()
    assert "base_model: someone/small-bert" in card and f"at commit {commit}" in card
    assert not any(path.is_symlink() for path in target.rglob("*"))
    snapshot = next((cache / "models--someone--small-bert" / "snapshots").iterdir())
    assert run_command(snapshot, tmp_path / "again", "--quiet") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    assert run_command("someone/small-bert", tmp_path / "dry", *flags, "--dry_run") == 0


CODE = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


def test_a_tokenizers_own_code_runs_by_a_flag_alone(source, tmp_path, capsys):
    path = source / "tokenizer_config.json"
    content = json.loads(path.read_text())
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    path.write_text(json.dumps({**content, "auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}))
    (source / "own.py").write_text(CODE + f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    run_command(source, tmp_path / "without")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "without" / "own.py").exists()
    assert run_command(source, tmp_path / "with", "--trust_remote_code", "--no_verify") == 0
    assert (tmp_path / "ran").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "with", trust_remote_code=True).own


# Memory


@pytest.fixture
def large(tmp_path):
    """A folder for gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.full
@pytest.mark.newest
def test_memory(large):
    """A conversion needs little more than the size of its source, which is read as it lies on disk."""
    config = BertConfig(vocab_size=210_000, hidden_size=1024, num_hidden_layers=8, intermediate_size=4096)
    config.num_attention_heads = 16
    with torch.device("meta"):
        shapes = BertForMaskedLM(config).state_dict()
    source = large / "source"
    source.mkdir()
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(source)
    names = [name for name in shapes if not name.startswith("cls.predictions.decoder")]
    names += ["cls.predictions.decoder.bias"] if "cls.predictions.decoder.bias" in shapes else []
    weight_map, size = {}, 0
    for start in range(0, len(names), 100):
        state = {name: torch.rand(shapes[name].shape) * 0.04 - 0.02 for name in names[start : start + 100]}
        file = f"model-{start:05}.safetensors"
        save_file(state, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
        size += (source / file).stat().st_size
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    code = (
        "import sys\n"
        "from lsg_converter import cli, convert\n"  # the latter with all that it imports
        # Not resource's ru_maxrss, which starts from the peak of the process that started this one.
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "print(peak() - before)"
    )
    flags = ["--initial_model", str(source), "--model_name", str(large / "lsg"), "--quiet"]
    flags += ["--max_sequence_length", "1024"]

    def peak(*more):
        command = [sys.executable, "-c", code, *flags, *more]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    assert size > 1.2e9
    assert peak("--dry_run") < 0.1 * size
    assert peak() < 1.3 * size
