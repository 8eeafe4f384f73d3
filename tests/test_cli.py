"""The command, as a user types it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_command

from lsg_converter.options import parse_literals


ROOT = Path(__file__).parents[1]


def script(*flags, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "convert_checkpoint.py"), *map(str, flags)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_script(bert, tmp_path):
    result = script(
        "--initial_model", bert.source, "--model_name", "out/lsg", "--max_sequence_length", "700",
        "--model_kwargs", "{'block_size': 64, 'mask_first_token': true}", "--run_test", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    for text in (
        "bert, 512 positions",
        "LSGBertForPreTraining, 700 positions",
        "blocks of 64",
        "equal the source's to the bit (45 tensors)",
        "AutoModelForQuestionAnswering        bfloat16       700",
        'model = AutoModelForPreTraining.from_pretrained("out/lsg", trust_remote_code=True)',
    ):
        assert text in result.stdout
    lines = result.stdout.split("Use it with")[1].splitlines()
    code = "\n".join(line.strip() for line in lines if line.strip())
    loaded = subprocess.run(
        [sys.executable, "-c", code + "\nassert model.config.mask_first_token and tokenizer.model_max_length == 700"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr


def test_a_wrong_call_is_one_line(bert, tmp_path):
    result = script(
        "--initial_model", bert.source, "--model_name", "lsg", "--max_sequence_length", "many", cwd=tmp_path
    )
    assert result.returncode == 2 and not result.stdout
    assert (
        result.stderr
        == "error: --max_sequence_length/--max-sequence-length: invalid int value: 'many'; --help lists the options\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "flags", "message"),
    [
        (2, ["--lenght", "3"], "error: --lenght: no such option"),
        (2, ["--max_sequence_length", "-3"], "error: --max_sequence_length: got -3"),
        (2, ["--model_kwargs", "block_size=3"], "error: --model_kwargs: got 'block_size=3'"),
        (3, ["--initial_model", "nobody/nothing"], "error: --initial_model: 'nobody/nothing' is no folder"),
        (4, ["--model_name", "/proc/lsg"], "error: --model_name: '/proc/lsg' cannot be written"),
    ],
)
def test_exit_codes(bert, tmp_path, capsys, code, flags, message):
    assert run_command(bert.source, tmp_path / "lsg", *flags) == code
    output = capsys.readouterr()
    assert output.err.startswith(message) and output.err.count("\n") == 1 and not output.out
    assert not list(tmp_path.iterdir())


def test_interrupted(bert, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("lsg_converter.convert"), "assemble", interrupt)
    assert run_command(bert.source, tmp_path / "lsg") == 130
    assert capsys.readouterr().err == "error: interrupted; nothing is left half-written\n"
    assert not list(tmp_path.iterdir())


def test_help_and_version(capsys):
    from lsg_converter import __version__, cli

    for flag, text in (("--help", "--global_positional_stride"), ("--version", f"lsg-converter {__version__}")):
        with pytest.raises(SystemExit) as caught:
            cli.main([flag])
        assert caught.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("{}", {}),
        ('{"block_size": 64, "adaptive": false, "sparsity_type": null}', {"adaptive": False, "sparsity_type": None}),
        ("{'block_size': 64, 'adaptive': False, 'sparsity_type': None}", {"adaptive": False, "sparsity_type": None}),
        (" {'block_size': 64, 'mask_first_token': true}", {"mask_first_token": True}),
        ({"block_size": 64}, {}),
    ],
)
def test_literals(text, expected):
    if text not in (None, "{}"):
        expected = {"block_size": 64, **expected}
    assert parse_literals(text) == expected
