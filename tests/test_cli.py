"""The command, as a user types it."""

import importlib
import io
import os
import pty
import re
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


def test_script(bert, tmp_path, monkeypatch):
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
        "AutoModelForQuestionAnswering       bfloat16     700 ",
        'model = AutoModelForPreTraining.from_pretrained("out/lsg", trust_remote_code=True)',
    ):
        assert text in result.stdout
    row = "rows of embeddings.position_embeddings repeat the source's to the bit (700 rows)"
    assert f"\nverified      {row}\n" in result.stdout  # a long line is not wrapped
    assert "\x1b" not in result.stdout and not re.search(" $", result.stdout, re.MULTILINE)
    lines = result.stdout.split("Use it with")[1].splitlines()
    code = "\n".join(line.strip() for line in lines if line.strip())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["model"].config.mask_first_token and names["tokenizer"].model_max_length == 700


class Terminal:
    """The command in a terminal: the text that it writes there, and its exit code."""

    def __init__(self, *flags, columns=80, press=(None, b"")):
        variables = {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONPATH": ""}
        # Those of whoever runs the tests do not count.
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        command = [sys.executable, str(ROOT / "convert_checkpoint.py"), *map(str, flags)]
        pid, terminal = pty.fork()
        if not pid:
            os.execve(command[0], command, {**kept, **variables})
        shown, (step, key) = b"", press
        while part := self.read(terminal):
            shown += part
            if step and step in shown:
                os.write(terminal, key)
                step = None
        os.close(terminal)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.text = shown.decode().replace("\r\n", "\n")

    @staticmethod
    def read(terminal):
        try:
            return os.read(terminal, 2**16)
        except OSError:  # how Linux says that the other end is closed
            return b""


def without_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_on_a_terminal(bert, tmp_path):
    flags = ["--initial_model", bert.source, "--model_name", tmp_path / "lsg", "--max_sequence_length", "700"]
    result = Terminal(*flags, columns=60)
    assert result.returncode == 0
    progress, text = result.text.split("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the progress gone
    assert "verifying the weights" in progress and "verified" not in progress
    assert "\x1b[32m✓ verified    \x1b[0m700 tokens give finite states \x1b[36m(float32, " in text
    description, code = without_codes(text).split("Use it with")
    assert max(map(len, description.splitlines())) <= 60
    assert (
        "\n✓ verified    rows of embeddings.position_embeddings repeat \n              the source's to" in description
    )
    assert f'\n    tokenizer = AutoTokenizer.from_pretrained("{tmp_path / "lsg"}")\n' in code  # not wrapped


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("screen", "variables", "codes"),
    [
        (Screen, {}, {"1;31", "0"}),
        (Screen, {"NO_COLOR": "1"}, {"1", "0"}),
        (Screen, {"TERM": "dumb"}, set()),
        (io.StringIO, {}, set()),
        (io.StringIO, {"FORCE_COLOR": "1"}, {"1;31", "0"}),
    ],
)
def test_names_are_literal_and_colours_the_terminals(bert, tmp_path, monkeypatch, screen, variables, codes):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "500", **variables}.items():
        monkeypatch.setenv(name, value)
    odd = tmp_path / ("[red]no[/red] [/] :smile: " * 8)
    monkeypatch.setattr(sys, "stderr", screen())
    assert run_command(odd, tmp_path / "lsg") == 3
    error = sys.stderr.getvalue()
    assert set(re.findall(r"\x1b\[([0-9;]*)m", error)) == codes
    assert (
        without_codes(error).startswith(f"error: --initial_model: there is no folder '{odd}'")
        and error.count("\n") == 1
    )
    odd.parent.mkdir(parents=True)
    odd.symlink_to(bert.source)
    monkeypatch.setattr(sys, "stdout", screen())
    assert run_command(odd, tmp_path / "lsg", "--dry_run") == 0
    description = sys.stdout.getvalue()
    assert set(re.findall(r"\x1b\[([0-9;]*)m", description)) == {code.removesuffix(";31") for code in codes}
    assert f"source        {odd}: bert, 512 positions\n" in without_codes(description)
    assert sys.stderr.getvalue() == error


def test_quiet_on_a_terminal(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Screen())
    assert run_command(bert.source, tmp_path / "lsg", "--no_verify", "--quiet") == 0
    assert not sys.stdout.getvalue() and not sys.stderr.getvalue()
    assert run_command(bert.source, tmp_path / "again", "--no_verify") == 0
    assert "writing" in sys.stderr.getvalue()


@pytest.mark.full
def test_interrupted_on_a_terminal(bert, tmp_path):
    flags = ["--initial_model", bert.source, "--model_name", tmp_path / "lsg", "--run_test"]
    result = Terminal(*flags, press=(b"running AutoModel", b"\x03"))
    assert result.returncode == 130 and not list(tmp_path.iterdir())
    end = "\x1b[?25h\r\x1b[1A\x1b[2K\x1b[1;31merror:\x1b[0m interrupted; nothing is left half-written\n"
    assert result.text.endswith(end)


def test_a_wrong_call_is_one_line(bert, tmp_path):
    result = script(
        "--initial_model", bert.source, "--model_name", "lsg", "--max_sequence_length", "many", cwd=tmp_path
    )
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == "error: --max_sequence_length: got 'many'; give a whole number\n"
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

    monkeypatch.setattr(importlib.import_module("lsg_converter.conversion"), "assemble", interrupt)
    assert run_command(bert.source, tmp_path / "lsg") == 130
    assert capsys.readouterr().err == "error: interrupted; nothing is left half-written\n"
    assert not list(tmp_path.iterdir())


def test_help_and_version(capsys):
    from lsg_converter import __version__, cli

    for flag, text in (("--help", "--global_positional_stride"), ("--version", f"lsg-converter {__version__}")):
        with pytest.raises(SystemExit) as caught:
            cli.main([flag])
        assert caught.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--lenght", "3"], ["--seed", "x"], []])
def test_flags_are_read_without_torch(flags):
    code = (
        "import sys\n"
        "from lsg_converter.__main__ import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == (0 if flags in (["--help"], ["--version"]) else 2), result.stderr


def test_the_package_gives_its_names_when_they_are_asked_for():
    code = (
        "import sys, lsg_converter\n"
        "assert set(lsg_converter.__all__) <= set(dir(lsg_converter)) and 'torch' not in sys.modules\n"
        "lsg_converter.nothing\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr.endswith("AttributeError: module 'lsg_converter' has no attribute 'nothing'\n")
    names: dict = {}
    exec("import lsg_converter.conversion\nfrom lsg_converter import *", names)
    assert names["convert"] is names["lsg_converter"].conversion.convert
    assert issubclass(names["ConversionError"], Exception)


@pytest.mark.parametrize("flags", [["--initial_model", "x"], ["--model_name", "x"]])
def test_what_is_missing(capsys, flags):
    from lsg_converter import cli

    absent, wanted = {
        "--initial_model": ("model_name", "the folder to write"),
        "--model_name": ("initial_model", "the model to convert: a name on the Hugging Face Hub, or a folder"),
    }[flags[0]]
    assert cli.main(flags) == 2
    assert capsys.readouterr().err == f"error: --{absent}: it is missing; give {wanted}; --help lists the options\n"


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
