"""The fine-tuning scripts of `experiments`, for a few steps with tiny models."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_command
from datasets.fingerprint import Hasher
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)


sys.path.append(str(Path(__file__).parents[1] / "experiments"))
sys.path.extend(map(str, Path(sys.path[-1]).iterdir()))

import common
import encode_ray
import make_data
import run_classification
import run_mlm
import run_qa
import run_retrieval
import run_summarization


pytestmark = pytest.mark.newest
WORDS = [f"w{number}" for number in range(5, 120)]  # of the recorded tokenizers
STEADY = ["--model_kwargs", "{'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}"]
WAYS = ["all", *(pytest.param(name, marks=pytest.mark.full) for name in ("lora", "globals"))]
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no"]


@pytest.fixture(autouse=True)
def random_fingerprints(monkeypatch):
    """Those of `datasets` pickle all that a function can reach, up to every module that other tests brought."""
    monkeypatch.setattr(Hasher, "update", lambda self, value: self.m.update(os.urandom(8)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """LSG-BERT, LSG-BART and a sentence model, tiny and random, of 1,000 tokens."""
    folder = tmp_path_factory.mktemp("models")
    SentenceTransformer(str(GOLDEN / "bert" / "source")).save(str(folder / "sentence"))
    sources = {"bert": GOLDEN / "bert" / "source", "bart": GOLDEN / "bart" / "source", "minilm": folder / "sentence"}
    for name, source in sources.items():
        flags = ["--max_sequence_length", "1000", "--quiet", "--no_verify"]
        assert run_command(source, folder / f"lsg-{name}", *flags) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of 300 words. `topic` is a word that stands often in the second half alone, and so on for other tasks."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def row(number):
        topics = [f"w{50 + 10 * (number % 3)}", f"w{50 + 10 * (number * 2 % 3)}"]
        words = draw.choices(WORDS[:40], k=150) + draw.choices(topics, [4, 1], k=150)
        text, place = " ".join(words), number % 100 + 20
        answer = {"text": [" ".join(words[place : place + 2])], "answer_start": [len(" ".join(words[:place])) + 1]}
        return {
            "id": str(number), "text": text, "paragraphs": [" ".join(words[:100]), " ".join(words[100:])],
            "topic": topics[0], "topics": sorted({*topics}), "question": "w119 w118", "answers": answer,
            "summary": " ".join(words[-5:]), "query": f"w{5 + number} {topics[0]}",
        }  # fmt: skip

    for split, count in (("train", 16), ("validation", 6), ("test", 5)):
        lines = [json.dumps(row(number)) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(models, name, data, target, *more, steps=4, batch=4):
    files = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", f"{data}/{split}.jsonl")]
    model = ["--model_name_or_path", str(models / f"lsg-{name}"), "--trust_remote_code", "--output_dir", str(target)]
    size = ["--max_steps", str(steps), "--per_device_train_batch_size", str(batch), "--learning_rate", "0.02"]
    return [*model, *files, *size, *QUIET, *more]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def losses(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


# Each script


def test_classification(models, data, tmp_path, capsys):
    """A topic that shows late is learned by what reads so far; what was saved classifies as it did."""
    target = tmp_path / "out"
    columns = ["--label_column_name", "topic", "--source_length", "64"]
    columns += ["--max_train_samples", "8", "--learning_rate", "0.005", *STEADY]  # the same batch in each step
    arguments = flags(models, "bert", data, target, *columns, "--do_train", "--do_predict", steps=10, batch=8)
    assert run_classification.main(arguments) == 0
    content = results(target)
    assert content["seed"] == 42 and content["versions"]["torch"] == torch.__version__
    assert content["training"]["learning_rate"] == 0.005 and content["flags"] == arguments
    rows = {row["system"]: row for row in content["results"]}
    assert list(rows) == list(run_classification.SYSTEMS)
    assert rows["lsg"]["accuracy"] == 1 and rows["tfidf"]["accuracy"] >= 0.8 > rows["truncation"]["accuracy"]
    assert all({"micro_f1", "macro_f1", "accuracy"} <= row.keys() and row["split"] == "test" for row in rows.values())
    assert all(0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1 for row in rows.values())
    for folder in (target, target / "chunks"):
        assert losses(folder)[-1] < 0.8 * losses(folder)[0], (folder, losses(folder))
    assert losses(target / "truncation") != losses(target)
    assert "| lsg | test |" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(target, trust_remote_code=True)
    assert model.config.label2id == {"w50": 0, "w60": 1, "w70": 2}
    again = ["--model_name_or_path", str(target), "--trust_remote_code", "--test_file", f"{data}/test.jsonl", *QUIET]
    again += ["--do_predict", "--output_dir", str(tmp_path / "again"), "--label_column_name", "topic"]
    assert run_classification.main(again) == 0
    (row,) = results(tmp_path / "again")["results"]
    assert row["loss"] == pytest.approx(rows["lsg"]["loss"], abs=1e-5) and row["accuracy"] == rows["lsg"]["accuracy"]


@pytest.mark.full
def test_many_labels_lists_of_paragraphs_and_other_settings(models, data, tmp_path):
    columns = ["--text_column_name", "paragraphs", "--label_column_name", "topics", "--systems", "lsg", "tfidf"]
    settings = ["--eval_sparsity_types", "none", "norm", "--eval_block_sizes", "128", "32"]
    more = [
        "--do_train",
        "--do_eval",
        *columns,
        *settings,
        "--model_kwargs",
        "{'block_size': 64, 'sparsity_type': 'none'}",
    ]
    assert run_classification.main(flags(models, "bert", data, tmp_path, *more)) == 0
    rows = results(tmp_path)["results"]
    lsg = [row for row in rows if row["system"] == "lsg"]
    assert [(row["block_size"], row["sparsity_type"]) for row in lsg] == [
        (128, "none"), (128, "norm"), (32, "none"), (32, "norm"),
    ]  # fmt: skip
    assert len({row["loss"] for row in lsg}) == 4 and rows[-1]["system"] == "tfidf"
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).config
    assert (config.problem_type, config.block_size) == ("multi_label_classification", 64)


def test_a_document_gets_the_mean_of_its_chunks_logits(models):
    ids = [2, *range(5, 105), 3]
    parts = run_classification.chunks(ids, 35)  # room for 33 tokens: a rest of one is spread over all
    assert [token for part in parts for token in part[1:-1]] == ids[1:-1] and [*map(len, parts)] == [27] * 4
    assert all((part[0], part[-1]) == (2, 3) for part in parts) and run_classification.chunks([2, 3], 35) == [[2, 3]]
    model = AutoModelForSequenceClassification.from_pretrained(models / "lsg-bert", trust_remote_code=True).eval()
    short = [[2, 9, 8, 3]]
    rows = [{"input_ids": parts, "labels": 1}, {"input_ids": short, "labels": 0}]
    tokenizer = common.AutoTokenizer.from_pretrained(models / "lsg-bert")
    batch = run_classification.ChunkCollator(run_classification.DataCollatorWithPadding(tokenizer))(rows)
    with torch.no_grad():
        loss, outputs = run_classification.ChunkTrainer.compute_loss(None, model, batch, return_outputs=True)
        wanted = [
            torch.stack([model(torch.tensor([part])).logits[0] for part in row]).mean(0) for row in (parts, short)
        ]
    torch.testing.assert_close(outputs["logits"], torch.stack(wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(torch.stack(wanted), torch.tensor([1, 0])))


@pytest.mark.parametrize("trained", WAYS)
def test_masked_language_modelling(models, data, tmp_path, trained):
    more = ["--do_train", "--do_eval", "--train", trained, "--max_seq_length", "200"]
    assert run_mlm.main(flags(models, "bert", data, tmp_path, *more, steps=8)) == 0
    before, after = results(tmp_path)["results"]
    assert (before["model"], after["model"]) == ("before", "after") and after["loss"] < before["loss"]
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    if trained == "lora":
        assert (tmp_path / "adapter_model.safetensors").exists()
        return
    new = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True).state_dict()
    old = AutoModelForMaskedLM.from_pretrained(models / "lsg-bert", trust_remote_code=True).state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    globals_alone = all("global_embeddings" in name or name.startswith("cls.") for name in changed)
    assert any("global_embeddings" in name for name in changed) and globals_alone is (trained == "globals")


def test_question_answering(models, data, tmp_path):
    columns = ["--context_column_name", "text", "--do_train", "--do_eval"]
    assert run_qa.main(flags(models, "bert", data, tmp_path, *columns, steps=8)) == 0
    (row,) = results(tmp_path)["results"]
    assert row["split"] == "validation" and 0 <= row["exact_match"] <= row["f1"] <= 100
    assert sum(losses(tmp_path)[-2:]) < sum(losses(tmp_path)[:2])
    AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True)


def test_answers_are_found_where_they_stand(models, data):
    tokenizer = common.AutoTokenizer.from_pretrained(models / "lsg-bert")
    reader = run_qa.Reader(tokenizer, run_qa.QuestionArguments(context_column_name="text"))
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        encoded = reader.encode(row)
        first, last = encoded["start_positions"], encoded["end_positions"]
        assert tokenizer.decode(encoded["input_ids"][first : last + 1]) == row["answers"]["text"][0]
        logits = np.zeros((2, len(encoded["input_ids"]) + 7))  # as padded in a batch
        logits[0, first], logits[1, last] = 1, 1
        reader.rows = [row]
        output = run_qa.EvalPrediction(predictions=logits[:, None], label_ids=None)
        assert reader.compute_metrics(output) == {"exact_match": 100, "f1": 100}
    tokenizer.model_max_length = 20
    assert reader.encode(row)["start_positions"] == 0  # It stands beyond what is read.


def test_the_best_span_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for length in (1, 2, 9, 30):
        start, end, allowed = draw.normal(size=length), draw.normal(size=length), draw.random(length) < 0.8
        allowed[0] = True
        spans = {
            (i, j): start[i] + end[j]
            for i in range(length) for j in range(i, min(i + 5, length)) if allowed[i] and allowed[j]
        }  # fmt: skip
        *span, score = run_qa.best_span(start, end, allowed, 5)
        assert spans[tuple(span)] == score == max(spans.values())


def test_f1_of_answers():
    assert run_qa.f1("the Cat, sat", "a cat sat") == 1 and run_qa.f1("", "") == 1 and run_qa.f1("", "cat") == 0
    assert run_qa.f1("cat sat on mat", "cat mat dog") == pytest.approx(4 / 7)


def test_summarization(models, data, tmp_path):
    recipe = run_summarization.RecipeArguments(str(tmp_path))
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.generation_num_beams) == (8e-5, 0.1, 5)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 32
    assert run_summarization.SummaryArguments().max_target_length == 512
    more = ["--do_train", "--do_predict", "--max_target_length", "8", "--gradient_accumulation_steps", "1"]
    more += ["--eval_sparsity_types", "none", "norm", "--generation_num_beams", "2"]
    assert run_summarization.main(flags(models, "bart", data, tmp_path, *more, steps=8)) == 0
    rows = results(tmp_path)["results"]
    assert [row["sparsity_type"] for row in rows] == ["none", "norm"] and rows[0]["loss"] != rows[1]["loss"]
    assert all({"rouge1", "rouge2", "rougeL"} <= row.keys() and 0 < row["tokens"] <= 8 for row in rows)
    assert sum(losses(tmp_path)[-2:]) < sum(losses(tmp_path)[:2])
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("trained", WAYS)
def test_retrieval(models, data, tmp_path, trained):
    more = ["--do_train", "--do_eval", "--document_column_name", "text", "--train", trained]
    more += ["--max_train_samples", "8", *STEADY]  # the same batch in each step
    more += ["--mini_batch_size", "2"] if trained == "all" else []
    assert run_retrieval.main(flags(models, "minilm", data, tmp_path, *more, steps=6, batch=8)) == 0
    before, after = results(tmp_path)["results"]
    assert before.keys() == after.keys() >= {"nDCG@10", "recall@1", "MRR@10"}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    source = SentenceTransformer(str(models / "lsg-minilm"), trust_remote_code=True, device="cpu")
    text = " ".join(WORDS[:100]) * 4
    assert abs(again.encode(text) - source.encode(text)).max() > 1e-4


# What Trainer brings


@pytest.mark.full
def test_training_goes_on_where_it_was(models, data, tmp_path):
    """Stopped after two of four steps, and resumed, it gives the weights of the whole run."""
    more = ["--context_column_name", "text", "--do_train", "--save_strategy", "steps", "--save_steps", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_qa.main(flags(models, "bert", data, whole, *more)) == 0
    parts.mkdir()
    (whole / "checkpoint-2").rename(parts / "checkpoint-2")
    assert run_qa.main(flags(models, "bert", data, parts, *more, "--resume_from_checkpoint", "true")) == 0
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    first, second = (
        AutoModelForQuestionAnswering.from_pretrained(path, trust_remote_code=True) for path in (whole, parts)
    )
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.full
def test_checkpointing_accumulation_and_half_precision(models, data, tmp_path):
    """Less memory, the same losses; in bfloat16 nearly so."""
    ways = {
        "plain": [],
        "checkpointing": ["--gradient_checkpointing"],
        "accumulation": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
        "bf16": ["--bf16"],
    }
    columns = ["--label_column_name", "topic", "--systems", "lsg", "chunks", "--do_train", *STEADY]
    curves = {}
    for name, more in ways.items():
        assert run_classification.main(flags(models, "bert", data, tmp_path / name, *columns, *more)) == 0
        curves[name] = [losses(tmp_path / name), losses(tmp_path / name / "chunks")]
    for name, tolerance in (("checkpointing", 1e-5), ("accumulation", 1e-4)):
        np.testing.assert_allclose(curves[name], curves["plain"], rtol=0, atol=tolerance, err_msg=name)
    half, plain = (np.array(curves[name])[:, :2] for name in ("bf16", "plain"))  # Later steps grow apart.
    np.testing.assert_allclose(half, plain, rtol=0, atol=0.05)
    assert (half != plain).all()


# Mistakes


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        ("mlm", ["--no_such_flag"], "--no_such_flag"),
        ("mlm", ["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("mlm", [], "nothing to do; give --do_train"),
        ("mlm", ["--do_train", "--train", "some"], "some"),
        ("mlm", ["--do_train", "--dataset_name", "me/texts"], "data: give --dataset_name, or files"),
        ("mlm", ["--do_train", "--train_file", "absent.jsonl"], "data: "),
        ("mlm", ["--do_train", "--train_file", "texts.parquet"], "give all as csv, json or jsonl"),
        ("mlm", ["--do_train", "--text_column_name", "body"], "has no column 'body'; it has id, text"),
        ("mlm", ["--do_train", "--max_seq_length", "5000"], "--max_seq_length: got 5000; the checkpoint reads 1000"),
        ("mlm", ["--do_train", "--max_seq_length", "0"], "--max_seq_length: got 0; the checkpoint reads 1000"),
        ("mlm", ["--do_train", "--model_kwargs", "{'block': 8}"], "--model_kwargs: got block"),
        ("mlm", ["--do_train", "--model_kwargs", "{'block_size': 0}"], "block_size: got 0; allowed is at least 1"),
        ("mlm", ["--do_train", "--resume_from_checkpoint", "absent"], "'absent' is no checkpoint; give one"),
        ("mlm", ["--do_train", "--model_name_or_path", "absent"], "--model_name_or_path: 'absent'"),
        ("mlm", ["--do_train", "--trust_remote_code", "false"], "--trust_remote_code: it is missing"),
        ("classification", ["--do_train", "--systems", "magic"], "--systems: got magic"),
        ("classification", ["--do_train", "--source_length", "2"], "--source_length: got 2; give 3 or more"),
        ("classification", ["--do_eval", "--systems", "tfidf"], "--systems: without --do_train"),
        ("classification", ["--do_train", "--resume_from_checkpoint", "CHECKPOINT"], "a checkpoint is of one system"),
        ("classification", ["--do_eval", "--label_column_name", "topic"], "the model knows LABEL_0, LABEL_1"),
        ("summarization", ["--do_train", "--eval_sparsity_types", "x"], "sparsity_type: got 'x'"),
        ("summarization", ["--do_train"], "give an encoder-decoder"),
        ("retrieval", ["--do_train", "--gradient_checkpointing", "--mini_batch_size", "2"], "--mini_batch_size: "),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_line(models, data, tmp_path, capsys, script, more, message):
    scripts = {
        "mlm": run_mlm, "classification": run_classification, "summarization": run_summarization,
        "retrieval": run_retrieval,
    }  # fmt: skip
    (tmp_path / "trainer_state.json").touch()
    more = [str(tmp_path) if word == "CHECKPOINT" else word for word in more]
    capsys.readouterr()
    model = "bart" if "--eval_sparsity_types" in more else "bert"
    assert scripts[script].main(flags(models, model, data, tmp_path, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_source_that_is_not_converted_gets_the_command_that_converts_it(models, data, tmp_path, capsys):
    source = str(GOLDEN / "bert" / "source")
    more = ["--do_train", "--model_name_or_path", source, "--max_seq_length", "600"]
    capsys.readouterr()
    assert run_mlm.main(flags(models, "bert", data, tmp_path, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"lsg-convert --initial_model {source} --model_name lsg-source --max_sequence_length 600")


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(common.OptionError, match=r'datasets is missing; pip install "\.\[experiments\]" brings it'):
        common.need("datasets")
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert encode_ray.main(["--model", "model", "--texts", "texts"]) == 2
    assert capsys.readouterr().err == 'error: ray.data is missing; pip install "ray[data]" brings it\n'


@pytest.mark.full
def test_the_data_is_made_of_real_text(tmp_path, monkeypatch, capsys):
    """No text of one split stands in another; answers stand where they are said to."""
    some = Path(torch.__file__).parent / "distributed"  # of torch, all of which takes twenty seconds
    monkeypatch.setattr(make_data, "package", lambda name: [some])
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(tmp_path), "--words", "100"])
    assert make_data.main() == 0
    rows = {
        (path.parent.name, path.stem): [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.glob("*/*.jsonl")
    }
    assert len(rows) == 12 and all(rows.values())
    for row in rows["question_answering", "train"][:50]:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(answer)] == answer
    assert len({row["label"] for row in rows["classification", "test"]}) == make_data.LABELS
    for task, column in (("summarization", "summary"), ("retrieval", "query"), ("classification", "text")):
        texts = [{row[column] for row in rows[task, split]} for split in make_data.SPLITS]
        assert not texts[0] & texts[2] and len(texts[0]) > 20
