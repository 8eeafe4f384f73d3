"""README.md and docs/: their snippets run, their links lead somewhere, and they name all that there is."""

import ast
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from inspect import getsource
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
import torch
from conftest import GOLDEN, run_command
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    EuroBertConfig,
    PreTrainedConfig,
    Qwen3Config,
    TrainingArguments,
)

from lsg_converter import ConversionError, cli, families, tune_cli
from lsg_converter.modeling.lsg_attention import KERNELS
from lsg_converter.modeling.lsg_config import LSGSeq2SeqConfig
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *DOCS, ROOT / "CONTRIBUTING.md")}
WITH_SNIPPETS = [name for name, text in PAGES.items() if "```" in text and name != "CONTRIBUTING.md"]
pytestmark = pytest.mark.newest


# Snippets


class Block(NamedTuple):
    """A fenced block of a page, and the line that it stands on; `runs` is False where a comment says so."""

    language: str
    code: str
    line: int
    runs: bool


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^(<!-- not run: .+ -->\n)?```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(item[2], item[3], text.count("\n", 0, item.start(3)), not item[1]) for item in found]


def sentence_model(folder: Path) -> None:
    SentenceTransformer(str(GOLDEN / "bert" / "source")).save(str(folder))  # which adds mean pooling


def cross_encoder(folder: Path) -> None:
    CrossEncoder(str(GOLDEN / "bert" / "source"), num_labels=1).save_pretrained(str(folder))


def lsg_bert(folder: Path) -> None:
    assert run_command(GOLDEN / "bert" / "source", folder, "--quiet", "--no_verify") == 0


def random_model(config: type[PreTrainedConfig], auto: type = AutoModel) -> Callable[[Path], None]:
    """A small one, with the tokenizer of the recorded BERT."""

    def make(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "bert" / "source")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "mask_token_id": 4}
        fields = {**sizes, **ids, "vocab_size": len(tokenizer), "head_dim": 8, "intermediate_size": 32}
        auto.from_config(config(**fields)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make


# What the names in the pages stand for here: small models in folders of that name.
SOURCES = {
    "bert-base-uncased": lambda folder: shutil.copytree(GOLDEN / "bert" / "source", folder),
    "facebook/bart-base": lambda folder: shutil.copytree(GOLDEN / "bart" / "source", folder),
    "ccdv/lsg-bart-base-4096": lambda folder: shutil.copytree(GOLDEN / "bart" / "published", folder),
    "sentence-transformers/all-MiniLM-L6-v2": sentence_model,
    "cross-encoder/ms-marco-MiniLM-L6-v2": cross_encoder,
    "lsg-bert-base-uncased": lsg_bert,
    "EuroBERT/EuroBERT-210m": random_model(EuroBertConfig),
    "Qwen/Qwen3-0.6B": random_model(Qwen3Config, AutoModelForCausalLM),
}


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets(page, tmp_path, monkeypatch, capsys):
    """Blocks run in their order, and each line of a text block is printed by the block before it."""
    text = PAGES[page]
    for name, make in SOURCES.items():
        if name in text and f"--model_name {name}" not in text:
            make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict = {}
    printed: list[str] | None = None
    every = blocks(text)
    assert text.count("\n```") == 2 * len(every)
    for block, following in zip(every, [*every[1:], None], strict=True):
        if block.language == "text":
            assert printed is None or not set(block.code.splitlines()) - set(printed), f"{page}:{block.line}"
            continue
        ran = block.runs
        if block.language == "python":
            code = compile("\n" * block.line + block.code, page, "exec")
            # A minute of compiling is for tests/test_modeling.py.
            with torch._dynamo.config.patch(disable=True):
                exec(code if ran else "", names)
        elif block.language == "bash":
            fails = following is not None and following.code.startswith("error: ")
            for command in commands(block.code):
                ran = shell(command, block.runs, fails) and ran
        else:
            assert block.language == "yaml"
            Path(block.code.split()[1]).write_text(block.code)  # its first line is a comment with its name
        output = capsys.readouterr()
        printed = [*output.out.splitlines(), *output.err.splitlines()] if ran else None


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line) for line in lines]


def shell(command: list[str], runs: bool, fails: bool) -> bool:
    """Run a command, or hold that what it names is there. Returns whether it was run."""
    program, *arguments = command
    program = program.removeprefix(".venv/bin/")
    if program == "lsg-convert":
        if runs:
            assert (cli.main(arguments) != 0) is fails
        else:
            cli.Parser().options(arguments)
        return runs
    if program == "lsg-tune":
        tune_cli.TuneParser().options(arguments)
        return False
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for word in arguments for name in re.findall(r"^\.\[(.*)\]$", word)} <= extras.keys()
        assert "-c" not in arguments or (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    elif arguments[0] == "-m":
        assert program.startswith("python") and arguments[1] in ("venv", "pytest")
    else:
        assert program == "python"
        script, words = (ROOT / arguments[0]).read_text(), [word for word in arguments if word.startswith("--")]
        if "import common" in script:  # The fields of dataclasses are its flags.
            script += (ROOT / "experiments" / "common.py").read_text() + getsource(TrainingArguments)
        assert all(re.search(rf'"{word}"|^    {word[2:]}: ', script, re.MULTILINE) for word in words)
    return False


# Links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    result: set[str] = set()
    for heading in headings:
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(n for n in range(len(headings)) if (f"{name}-{n}" if n else name) not in result)
        result.add(f"{name}-{number}" if number else name)
    return result


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    folder = ROOT / "docs" if (ROOT / "docs" / page).exists() else ROOT
    for link in re.findall(r"\]\(([^)]+)\)", without_code(PAGES[page])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else folder / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_code_is_where_the_pages_say():
    """A cell that links to files of code holds names that are in these files."""
    cells = re.findall(r"[^|\n]*\]\(\.\./[^)]+\.py\)[^|\n]*", PAGES["attention.md"])
    assert len(cells) > 5
    for cell in cells:
        code = "".join((ROOT / "docs" / path).read_text() for path in re.findall(r"\((\.\./[^)]+\.py)\)", cell))
        for name in re.findall(r"`([\w.]+)`", cell):
            assert all(re.search(rf"\b(def|class) {part}\b", code) for part in name.split(".")), name


def test_anchors_are_those_of_github():
    text = "# Kernels, and what they cost\n## With `a_flag`\n## B\n```\n# no\n```\n## B\n"
    assert anchors(text) == {"kernels-and-what-they-cost", "with-a_flag", "b", "b-1"}


# What there is


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of those rows of a page's tables whose first cell matches `first`, without backticks."""
    lines = re.findall(rf"^\| *{first}.*\|$", PAGES[page], re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_every_flag_is_there():
    flags = {flag for cells in rows("converting.md", "`--") for flag in re.findall(r"--(\w+)", cells[0])}
    assert flags == {*cli.known_options(), "no_use_token_ids"} - {"use_token_ids"}


def test_every_flag_of_tuning_is_there():
    flags = {flag for cells in rows("tuning.md", "`--") for flag in re.findall(r"--(\w+)", cells[0])}
    assert flags == {*cli.known_options(tune_cli.TuneParser.kinds)}


def test_every_field_is_there_with_its_default():
    defaults = {item.name: item.default for item in fields(LSGSeq2SeqConfig)}
    assert {cells[0]: ast.literal_eval(cells[1]) for cells in rows("using.md", "`")} == defaults


def test_every_exit_code_is_there():
    codes = {0, *(kind.exit_code for kind in (ConversionError, *ConversionError.__subclasses__()))}
    codes |= {cli.explain(error)[0] for error in (KeyboardInterrupt(), cli.Terminated(), ValueError())}
    shown = {int(code) for cells in rows("converting.md", r"\d") for code in cells[0].split(",")}
    assert shown == codes


def test_every_family_sparsifier_and_kernel_is_there():
    assert [cells[1] for cells in rows("families.md", r"\w[^|]*\| `[a-z0-9_-]+` \|")] == families.model_types()
    refused = {
        kind: cells[1] for cells in rows("families.md", r"`[a-z0-9_-]+`[^|]*\|") for kind in cells[0].split("`, `")
    }
    assert refused == families.REFUSED
    sparsifiers = [cells[0] for cells in rows("attention.md", r"`\w+` \|")]
    assert sparsifiers[0] == "sparsity_type" and {*sparsifiers[1:], "none"} == set(SPARSITY_TYPES)
    assert {cells[0] for cells in rows("kernels.md", r"`\w+` \|")} == set(KERNELS)


@pytest.mark.parametrize("page", [path.name for path in DOCS])
def test_a_page_begins_with_what_it_answers(page):
    assert re.match(r"# .+\n\nThis page says ", PAGES[page])
    assert f"docs/{page}" in PAGES["README.md"]
