"""`lsg-tune`: settings tried on texts, without labels."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_command
from sentence_transformers import SentenceTransformer
from transformers import BertForSequenceClassification

from lsg_converter import tune, tune_cli
from lsg_converter.options import ConversionOptions, OptionError, TuneOptions
from lsg_converter.tune import BASE, Row, choose, combine, command, settings


pytestmark = pytest.mark.newest
LENGTH = 1024
SMALL = "{'num_global_tokens': [1, 0], 'position_init': ['tile', 'stretch'], 'exact': [False, True], "
SMALL += "'block_size': [128], 'sparsity_type': ['norm', 'none'], 'sparsity_factor': [2]}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three texts of 800 words, each of words of its own, and a short one."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for n in range(3):
        words = draw.choices([f"w{30 * n + m}" for m in range(5, 35)], k=800)
        (folder / f"{n}.txt").write_text(" ".join(words))
    (folder / "short.md").write_text("w5 w6 w7")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By kind, a tiny random model of 512 tokens."""
    folder = tmp_path_factory.mktemp("models")
    bert = GOLDEN / "bert" / "source"
    SentenceTransformer(str(bert)).save(str(folder / "sentences"))
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(folder / "classes")
    for path in bert.glob("*token*"):
        (folder / "classes" / path.name).write_bytes(path.read_bytes())
    for path in bert.glob("vocab*"):
        (folder / "classes" / path.name).write_bytes(path.read_bytes())
    return {"sentences": folder / "sentences", "classes": folder / "classes", "masked": bert}


def run(source, texts, *more):
    flags = ["--initial_model", source, "--texts", texts, "--max_sequence_length", LENGTH, *more]
    return tune_cli.main(list(map(str, flags)))


@pytest.mark.parametrize(
    ("kind", "metrics", "controls"),
    [
        ("sentences", ["MRR", "recall@1"], ["first 512 tokens", "mean of chunks of 512", "best chunk of 512"]),
        ("masked", ["loss"], ["chunks of 512"]),
        ("classes", ["KL divergence", "agreement"], ["first 512 tokens"]),
    ],
)
def test_a_model_of_each_kind(kind, metrics, controls, sources, texts, tmp_path, capsys):
    """Every setting has a row beside what it is compared with; the last line converts with the one that is chosen."""
    figure = tmp_path / "tune.png"
    more = ["--architecture", "BertForMaskedLM"] if kind == "masked" else []
    small = SMALL.replace("'tile', ", "") if kind == "classes" else SMALL
    assert run(sources[kind], texts, "--json", "--grid", small, "--figure", figure, *more) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in content["rows"]}
    expected = {"full attention", "base", *(f"source, {name}" for name in controls)}
    expected |= {"exact True", "num_global_tokens 0", "sparsity_type none"}
    expected |= {"position_init stretch"} if kind != "classes" else set()  # of which it tries one
    assert rows.keys() >= expected and content["metrics"] == metrics and len(rows) <= len(expected) + 1
    assert all(row["metrics"].keys() == set(metrics) and len(row["values"]) == 3 for row in rows.values())
    assert all(row["seconds"] > 0 for row in rows.values()) and figure.stat().st_size > 10_000
    if kind == "classes":
        assert rows["full attention"]["metrics"] == {"KL divergence": pytest.approx(0, abs=1e-6), "agreement": 1}
        assert rows["sparsity_type none"]["metrics"]["KL divergence"] > 0
    if kind == "masked":  # of a random model
        assert rows["full attention"]["metrics"]["loss"] == pytest.approx(np.log(128), abs=1)
    # Beyond what the source reads, `exact` is a model without global tokens.
    assert rows["exact True"]["values"] == rows["num_global_tokens 0"]["values"]
    assert kind == "sentences" or rows["exact True"]["values"] != rows["base"]["values"]
    words = content["command"].split()
    assert words[:3] == ["lsg-convert", "--initial_model", str(sources[kind])]


def test_a_person_reads_a_table_and_what_was_not_reached(sources, texts, capsys, monkeypatch):
    """The base is always there; without time for more, the other settings are named, in their order."""
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    grid = "{'position_init': ['tile'], 'exact': [False], 'block_size': [128, 64], 'sparsity_type': ['norm', 'none'], "
    grid += "'sparsity_factor': [2]}"
    assert run(sources["sentences"], texts, "--minutes", "1", "--grid", grid, "--max_texts", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("; 2 texts") and lines[1].startswith("base: exact False, num_global_tokens 1, ")
    assert any(line.startswith("full attention ") and line.endswith(" 1.00") for line in lines)
    assert "not reached in time: num_global_tokens 0; block_size 64; sparsity_type none" in lines
    assert lines[-1].strip().startswith("lsg-convert --initial_model ") and "model_kwargs" not in lines[-1]


def test_a_setting_that_is_plainly_best_is_chosen(sources, texts, monkeypatch, capsys):
    """What is measured is put here: blocks of 64 are good, no global tokens are good, and both are best."""

    def measure(self, setting, full=False):
        quality = 0.5 + 0.2 * (setting["block_size"] == 64) + 0.1 * (setting["num_global_tokens"] == 0)
        return tune.Measured({"MRR": [quality, quality + 0.01], "recall@1": [0, 0]}, 0.1)

    monkeypatch.setattr(tune.Retrieval, "measure", measure)
    monkeypatch.setattr(tune.Retrieval, "controls", lambda self, *_: [("full attention", measure(self, BASE))])
    assert run(sources["sentences"], texts, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["best"] == "num_global_tokens 0, block_size 64"
    flags = '\'{"num_global_tokens": 0, "block_size": 64, "sparse_block_size": 64}\''
    line = f"lsg-convert --initial_model {sources['sentences']} --model_name lsg-sentences --max_sequence_length 1024 "
    assert content["command"] == f"{line}--model_kwargs {flags}"


def row(name, values, **changes):
    return Row(name, {**BASE, **changes}, {}, 1.0, values)


def test_the_first_of_those_that_cannot_be_told_apart_is_chosen():
    good, noisy, bad = row("a", [0.5, 0.7, 0.6]), row("b", [0.9, 0.4, 0.6]), row("c", [0.1, 0.3, 0.2])
    assert choose([good, noisy, bad], higher=True) == (good, ["c"])
    assert choose([good, noisy, bad], higher=False) == (bad, ["a", "b"])
    assert choose([bad, good, noisy], higher=True) == (good, ["c"])


def test_combined_are_values_that_are_better_alone():
    rows = [row("base", [3, 3.1]), row("x", [2, 2.1], block_size=64), row("y", [2.9, 3.2], sparsity_type="none")]
    assert combine(BASE, rows, higher=False) == {**BASE, "block_size": 64}


def test_the_line_of_flags_is_one_that_a_conversion_takes():
    options = TuneOptions(initial_model="bert", texts="x", architecture="BertForMaskedLM")
    line = "lsg-convert --initial_model bert --model_name lsg-bert --max_sequence_length 4096 --architecture "
    line += "BertForMaskedLM"
    assert command(options, BASE) == line
    assert (
        command(options, {**BASE, "exact": True, "position_init": "stretch"})
        == f"{line} --position_init stretch --exact"
    )
    found = command(options, {**BASE, "exact": True, "sparsity_type": "lsh", "block_size": 32})
    fields = '{"block_size": 32, "sparsity_type": "lsh", "sparse_block_size": 32}'
    assert found == f"{line} --exact --model_kwargs '{fields}'"
    ConversionOptions(initial_model="bert", model_name="x", exact=True, model_kwargs=fields)


def test_the_base_comes_first_and_then_one_change_each():
    axes = {**BASE, "exact": [False, True], "num_global_tokens": [1, 0], "block_size": [128, 64]}
    axes = {name: values if isinstance(values, list) else [values] for name, values in axes.items()}
    rows = list(settings(axes, cross=False))
    assert rows == [BASE, {**BASE, "exact": True}, {**BASE, "num_global_tokens": 0}, {**BASE, "block_size": 64}]
    crossed = list(settings(axes, cross=True))
    assert crossed[:4] == rows and len(crossed) == 6  # two fewer: `exact` has no global tokens


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_sequence_length", "512"], "--max_sequence_length: got 512; the source reads 512 tokens: give 574 or"),
        (["--minutes", "0"], "--minutes: got 0; give at least 1"),
        (["--minuts", "3"], "--minuts: no such option; did you mean --minutes? --help lists them"),
        (["--grid", "[64]"], "--grid: got '[64]'; give a dictionary of literals"),
        (["--grid", "{'blocks': [64]}"], "--grid: got 'blocks'; give lists of exact, num_global_tokens"),
        (["--grid", "{'block_size': 64}"], "--grid: got 64 for block_size; give a list of values"),
        (["--grid", "{'block_size': [0]}"], "--grid: block_size: got 0; "),
        (["--grid", "{'block_size': [128, '64']}"], "--grid: got '64' for block_size; give whole numbers"),
        (["--grid", "{'exact': ['no']}"], "--grid: got 'no' for exact; give some of False, True"),
        (["--grid", "{'position_init': ['tile', 'wrap']}"], "--grid: got 'wrap' for position_init; give some of tile"),
        (["--figure", "nowhere/x.png"], "--figure: there is no folder 'nowhere'"),
        (["--figure", "x.txt"], "--figure: got 'x.txt'; give a name that ends in .png"),
        (
            ["--architecture", "BertForQuestionAnswering"],
            "--architecture: LSGBertForQuestionAnswering has nothing that",
        ),
        (["--texts", "nowhere.txt"], "--texts: 'nowhere.txt': "),
        (["--texts", "."], "--texts: '.' holds no texts"),
        (["--texts", "short.jsonl"], "--texts: got 0 of at least 572 tokens"),
        (["--max_texts", "1"], "--max_texts: got 1; give at least 2"),
        (["--texts", "wrong.jsonl"], "--texts: 'wrong.jsonl': unknown is 'text'"),
    ],
)
def test_what_cannot_be_is_one_line(more, message, sources, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"text": "w5 w6"}\n')
    (tmp_path / "wrong.jsonl").write_text('{"words": "w5 w6"}\n')
    assert run(sources["sentences"], texts, "--quiet", *more) != 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1, captured.err
    assert not captured.out and len(list(tmp_path.iterdir())) == 2


def test_a_masked_model_needs_a_mask_token(sources, texts, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(sources["masked"], source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = source / name
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": None}))
    assert run(source, texts, "--architecture", "BertForMaskedLM") == 3
    assert capsys.readouterr().err == f"error: --initial_model: '{source}' has no mask token; add it\n"


def test_a_classifier_tries_one_way_to_lengthen_positions(sources, texts, capsys):
    assert run(sources["classes"], texts, "--grid", SMALL) == 2
    line = "error: --grid: got ['tile', 'stretch'] for position_init; give one: without labels nothing says which is "
    assert capsys.readouterr().err == f"{line}right\n"


def test_a_model_that_is_converted_already_is_refused(sources, texts, tmp_path, capsys):
    """Without the flags of a conversion, which this command lacks."""
    assert run_command(sources["sentences"], tmp_path / "lsg", "--quiet", "--no_verify") == 0
    assert run(tmp_path / "lsg", texts) == 2
    line = (
        f"error: --initial_model: '{tmp_path / 'lsg'}' is an LSG checkpoint already; give the model that it was made "
    )
    assert capsys.readouterr().err == f"{line}from\n"


def test_a_head_that_was_not_trained_is_refused(sources, texts):
    options = TuneOptions(
        initial_model=str(sources["sentences"]), texts=str(texts), max_sequence_length=LENGTH,
        architecture="BertForTokenClassification",
    )  # fmt: skip
    with pytest.raises(OptionError, match="--architecture: the source has no weights classifier"):
        tune.tune(options)
