"""The benchmark of `experiments/efficiency`, on models of two narrow layers."""

import json
import math
import sys
from pathlib import Path
from statistics import median

import pytest
import torch


sys.path.append(str(Path(__file__).parents[1] / "experiments" / "efficiency"))

import benchmark
import measurement
import relative
import report
from contenders import CONTENDERS, build, without_attention


pytestmark = pytest.mark.newest
TINY = ["--width", "32", "--layers", "2", "--lengths", "64", "100", "--repeats", "1"]
NAMES = ["floor", "LSG 256/0", "LSG 128/128", "LSG 32/32", "full", "Longformer", "BigBird", "ModernBERT"]


def test_every_model_is_measured(tmp_path, capsys):
    assert benchmark.main([*TINY, "--output", str(tmp_path / "results"), "--figures", str(tmp_path / "img")]) == 0
    content = json.loads((tmp_path / "results" / "results.json").read_text())
    assert content["machine"]["threads"] == torch.get_num_threads()
    measured = {(item["mode"], item["length"], item["model"]): item for item in content["measurements"]}
    assert list(measured) == [(mode, n, name) for n in (64, 100) for mode in ("forward", "training") for name in NAMES]
    for (mode, length, name), item in measured.items():
        assert item["reason"] is None, (name, item["reason"])
        floor = measured[mode, length, "floor"]["seconds"]
        assert item["ratios"] == [own / least for own, least in zip(item["seconds"], floor, strict=True)]
        assert item["median_ratios"] == median(item["ratios"]) and item["peak_bytes"] >= 0
    table = (tmp_path / "results" / "results.md").read_text()
    assert all(table.count(f"\n| {name} |") == 4 for name in NAMES)
    assert table in capsys.readouterr().out
    figures = {path.name for path in tmp_path.glob("img/*")}
    assert figures == ({"cost_forward.png", "cost_training.png"} if has_matplotlib() else set())


def test_some_models_on_a_batch_with_short_texts(tmp_path, capsys):
    flags = ["--lengths", "320", "--models", "full", "--short_texts", "2", "--modes", "forward"]
    assert benchmark.main([*TINY, *flags, "--output", str(tmp_path), "--figures", str(tmp_path)]) == 0
    table = (tmp_path / "results.md").read_text()
    assert "batch of 1 and 2 of 300 tokens" in table and "LSG" not in table.split("##")[1]
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert [item["model"] for item in measured] == ["floor", "full"]
    assert measurement.Bench(320, benchmark.parse([*TINY, *flags])).mask.sum(1).tolist() == [320, 300, 300]


FAKE = """
import torch

class LSGRobertaConfig:
    def __init__(self, **fields):
        assert fields["sparsity_type"] == "norm" and fields["block_size"] == 128
        self.fields = fields

class Output:
    def __init__(self, states):
        self.last_hidden_state = states

class LSGRobertaModel(torch.nn.Module):
    def __init__(self, config, add_pooling_layer):
        super().__init__()
        print("this is no answer")
        assert config.fields["num_hidden_layers"] < 3, "too deep"
        self.table = torch.nn.Embedding(config.fields["vocab_size"], 32)

    def forward(self, input_ids, attention_mask):
        return Output(self.table(input_ids))
"""


@pytest.mark.full
def test_the_published_implementation_runs_in_a_process_of_its_own(tmp_path):
    """A stand-in for it: what Transformers it needs does not go with ours."""
    package = tmp_path / "published" / "lsg_converter" / "roberta"
    package.mkdir(parents=True)
    for folder in (package, package.parent):  # As in the published package: without it, ours would be found first.
        (folder / "__init__.py").touch()
    (package / "modeling_lsg_roberta.py").write_text(FAKE)
    flags = [*TINY, "--models", "published LSG", "--published", str(tmp_path / "published")]
    flags += ["--output", str(tmp_path), "--figures", str(tmp_path)]
    assert benchmark.main(flags) == 0
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    outcome = [(item["model"], item["reason"], len(item["seconds"])) for item in measured]
    assert outcome == [("floor", None, 1), ("published LSG", None, 1)] * 4
    assert benchmark.main([*flags, "--layers", "3"]) == 0
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert measured[1]["reason"] == "RuntimeError: its process ended: AssertionError: too deep"


def has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_what_cannot_run_is_a_dash(tmp_path, monkeypatch):
    """The reason stands in the JSON, and the other models are measured."""

    def failing_build(family, *arguments):
        if family in ("full", "bigbird"):
            raise torch.OutOfMemoryError("no room\nat all")
        return build(family, *arguments)

    monkeypatch.setattr(measurement, "build", failing_build)
    monkeypatch.setattr(measurement, "first_step", lambda bench, contender, mode: bench.begin(contender))
    assert benchmark.main([*TINY, "--modes", "forward", "--output", str(tmp_path), "--figures", str(tmp_path)]) == 0
    measurements = json.loads((tmp_path / "results.json").read_text())["measurements"]
    failed = {item["model"]: item["reason"] for item in measurements if item["reason"]}
    assert failed == dict.fromkeys(("full", "BigBird"), "OutOfMemoryError: no room")
    table = (tmp_path / "results.md").read_text()
    assert "\n| full | - | - |" in table
    assert "\n- BigBird, forward pass, 100 tokens: OutOfMemoryError: no room\n" in table


def write_results(folder, missing, reason="MemoryError: no room"):
    """`results.json` of made-up seconds; the models of `missing` did not run at the lengths it gives."""
    options = benchmark.parse(["--lengths", "512", "1024", "2048", "--output", str(folder), "--figures", str(folder)])
    results = []
    for length in options.lengths:
        for place, name in enumerate(NAMES, 1):
            failed = length in missing.get(name, ())
            outcome = {"reason": reason} if failed else {"seconds": [place * length / 1000], "ratios": [float(place)]}
            results.append(measurement.Measurement("forward", length, name, **outcome))
    host = {"device": "an abacus", "threads": 1, "torch": "2", "transformers": "5"}
    report.write(folder, options, host, results)


def test_redraw_writes_tables_and_figures_again_and_measures_nothing(tmp_path, monkeypatch, capsys):
    flags = ["--redraw", "--output", str(tmp_path), "--figures", str(tmp_path / "img")]
    assert benchmark.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --redraw: ") and error.count("\n") == 1
    write_results(tmp_path, {"full": [2048]})
    before = (tmp_path / "results.json").read_text()
    monkeypatch.setattr(benchmark, "measure", None)
    assert benchmark.main(flags) == 0
    table = (tmp_path / "results.md").read_text()
    assert "an abacus" in table and "\n| full | 5.00 (2.56 s) | 5.00 (5.12 s) | - |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == before
    assert (tmp_path / "img" / "cost_forward.png").exists() == has_matplotlib()


@pytest.mark.parametrize(
    ("reason", "why"), [("MemoryError: no room", "too little memory"), ("ValueError: odd", "see results.md")]
)
def test_a_line_ends_where_the_model_did_not_run(tmp_path, monkeypatch, reason, why):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append(self))
    write_results(tmp_path, {"full": [2048], "BigBird": [1024]}, reason)
    assert benchmark.main(["--redraw", "--output", str(tmp_path), "--figures", str(tmp_path)]) == 0
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert list(lines) == ["ModernBERT", "BigBird", "Longformer", "full\n(to 1,024)", *reversed(NAMES[:4])]
    absent = {name: [math.isnan(y) for y in line.get_ydata()] for name, line in lines.items()}
    absent = {name: places for name, places in absent.items() if any(places)}
    assert absent == {"BigBird": [False, True, False], "full\n(to 1,024)": [False, False, True]}
    assert lines["Longformer"].get_ydata() == pytest.approx([6, 6, 6])
    assert drawn[0].get_suptitle().endswith(f"the model did not run: {why}.")
    styles = [contender.style for contender in CONTENDERS]
    assert all(len(set(column)) == len(styles) for column in zip(*styles, strict=True))


def test_the_floor_mixes_no_tokens_and_trains_every_projection():
    options = benchmark.parse(TINY)
    model = build("lsg", 64, options).eval()
    first = torch.full((1, 64), 5)
    second = first.clone()
    second[0, 40] = 9
    with without_attention():
        states, others = (model(tokens).last_hidden_state for tokens in (first, second))
        states.sum().backward()
    assert (states != others).any(-1).nonzero()[:, 1].tolist() == [40]
    attention = model.encoder.layer[0].attention.self
    assert all(getattr(attention, name).weight.grad is not None for name in ("query", "key", "value"))
    states, others = (model(tokens).last_hidden_state for tokens in (first, second))
    assert (states != others).any(-1).all()


@pytest.mark.parametrize(
    "flags",
    [
        "--lengths 0",
        "--lengths many",
        "--dropout 1",
        "--size huge",
        "--width 33",
        "--repeats -1",
        "--device gpu",
        "--models bert",
        "--models published LSG",
        "--published nowhere",
    ],
)
def test_a_wrong_call_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags.split(" ", 1))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.full
def test_the_cost_of_relative_positions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["relative.py", "--lengths", "300", "--layers", "1", "--rounds", "1"])
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    narrow_t5 = {"d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 32}
    for name, shape in relative.SHAPES.items():
        monkeypatch.setitem(relative.SHAPES, name, shape | (narrow_t5 if name == "t5" else narrow))
    relative.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [*relative.SHAPES]
    assert all(float(number.replace(",", "")) >= 0 for row in rows for number in row.split()[1:])


def test_without_a_bias_scores_are_another():
    model = relative.build("mpnet", 300, 1, stock=False).eval()
    ids = torch.arange(5, 305)[None]
    expected = model(ids).last_hidden_state
    with relative.without_bias():
        assert not torch.allclose(model(ids).last_hidden_state, expected)
    assert torch.equal(model(ids).last_hidden_state, expected)
