"""The scripts of `experiments` by several processes, on CPUs: what one process gives."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_command
from pyarrow import parquet
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForSequenceClassification


sys.path.append(str(Path(__file__).parents[1] / "experiments"))
sys.path.append(str(Path(sys.path[-1]) / "retrieval"))

import encode


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
pytestmark = [pytest.mark.newest, pytest.mark.full]
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An LSG-BERT and a sentence model, tiny and random, and texts with a topic."""
    folder = tmp_path_factory.mktemp("distributed")
    SentenceTransformer(str(GOLDEN / "bert" / "source")).save(str(folder / "sentences"))
    for name, source in (("lsg-bert", GOLDEN / "bert" / "source"), ("lsg-sentences", folder / "sentences")):
        assert run_command(source, folder / name, "--max_sequence_length", "1000", "--quiet", "--no_verify") == 0
    draw = random.Random(0)
    for split, count in (("train", 16), ("test", 5)):
        words = [" ".join(draw.choices([f"w{m}" for m in range(5, 45)], k=150 + 60 * n)) for n in range(count)]
        rows = [json.dumps({"text": text, "topic": f"w{n % 3}"}) for n, text in enumerate(words)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def run(*arguments):
    found = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def train(folder, target, batch, *launch):
    files = ["--train_file", folder / "train.jsonl", "--test_file", folder / "test.jsonl"]
    more = ["--label_column_name", "topic", "--systems", "lsg", "--do_train", "--do_predict", "--use_cpu"]
    more += ["--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no", "--max_steps", "4"]
    more += ["--learning_rate", "0.01", "--per_device_train_batch_size", batch, "--per_device_eval_batch_size", "1"]
    more += ["--model_kwargs", "{'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}"]
    model = ["--model_name_or_path", folder / "lsg-bert", "--trust_remote_code", "--output_dir", target]
    run(*launch, EXPERIMENTS / "classification" / "run_classification.py", *model, *files, *more)
    log = json.loads((target / "trainer_state.json").read_text())["log_history"]
    (row,) = json.loads((target / "results.json").read_text())["results"]
    return [entry["loss"] for entry in log if "loss" in entry], row["loss"]


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, folder / "alone", 8)


@pytest.mark.parametrize("more", [["--multi_gpu"], FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(folder, alone, tmp_path, more):
    """The losses of a batch of eight, in each step and behind; the checkpoint has the same weights by name, loads, and
    says the same. (Not to rounding: Adam takes a full step where a gradient is rounding alone, as of keys' biases.)"""
    losses, loss = train(folder, tmp_path, 4, *LAUNCH, *more)
    assert (
        len(losses) == 4 and losses == pytest.approx(alone[0], abs=2e-3) and loss == pytest.approx(alone[1], abs=1e-3)
    )
    folders = folder / "alone", tmp_path
    one, two = (load_file(path / "model.safetensors").keys() for path in folders)
    assert one == two
    models = [AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True) for path in folders]
    expected, actual = (model.eval()(torch.arange(5, 100)[None]).logits for model in models)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)


def test_a_corpus_is_encoded_by_two_processes_as_by_one(folder, tmp_path, capsys):
    """Vectors are the library's own, however many processes make them; files that are there stay as they are."""
    script = ["--model", folder / "lsg-sentences", "--trust_remote_code"]
    script += ["--texts", folder / "train.jsonl", "--shard_size", "6", "--batch_size", "2"]
    one, two = tmp_path / "one", tmp_path / "two"

    def encoded(target):
        assert encode.main([*map(str, script), "--output", str(target)]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    printed = run(EXPERIMENTS / "retrieval" / "encode.py", *script, "--output", two, "--devices", "cpu", "cpu")
    assert printed.splitlines()[-1] == encoded(one) == "3 files were written, 0 were there"
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    model = SentenceTransformer(str(folder / "lsg-sentences"), trust_remote_code=True, device="cpu")
    for vectors in (np.concatenate([np.load(path) for path in sorted(place.glob("*.npy"))]) for place in (one, two)):
        np.testing.assert_allclose(vectors, model.encode(texts, batch_size=2), atol=1e-5)
    (one / "00001.npy").unlink()
    np.save(one / "00002.npy", np.zeros(3))
    assert encoded(one) == "1 files were written, 2 were there"
    assert np.load(one / "00001.npy").shape == (6, 16) and np.load(one / "00002.npy").shape == (3,)


def test_ray_gives_the_vectors_of_one_process(folder, tmp_path, capsys):
    """Of a worker's process, beside their texts; what cannot be is one line, before a worker begins."""
    pytest.importorskip("ray.data")
    import encode_ray

    target = tmp_path / "vectors"
    script = ["--trust_remote_code", "--texts", folder / "train.jsonl", "--batch_size", "2", "--output", target]
    script = [*map(str, script), "--model"]
    for more, message in (
        (["nowhere"], "--model: 'nowhere': "),
        ([f"{folder}/lsg-sentences", "--workers", "0"], "--workers: got 0; give 1 or more"),
    ):
        assert encode_ray.main([*script, *more]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    run(EXPERIMENTS / "retrieval" / "encode_ray.py", *script, folder / "lsg-sentences")
    rows = parquet.read_table(target).to_pandas()
    assert len(rows) == 16 and {*rows["topic"]} == {"w0", "w1", "w2"}
    model = SentenceTransformer(str(folder / "lsg-sentences"), trust_remote_code=True, device="cpu")
    vectors = model.encode(list(rows["text"]), batch_size=2)
    np.testing.assert_allclose(np.stack(list(rows["vector"])), vectors, atol=1e-5)
    assert encode_ray.main([*script, f"{folder}/lsg-sentences"]) == 2
    assert "is there; give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--texts", "nowhere.jsonl"], "--texts: there is no file 'nowhere.jsonl'"),
        (["--text_column_name", "words"], "--texts: 'train.jsonl': unknown is 'words'"),
        (["--shard_size", "0"], "--shard_size: got 0; give 1 or more"),
        (["--output", "other"], "--output: 'other' has vectors of "),
    ],
)
def test_what_cannot_be_encoded_is_one_line(more, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "encode.json").write_text("{}")
    flags = ["--model", "sentences", "--texts", "train.jsonl", "--output", "vectors", *more]
    assert encode.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {message}"), error
