"""The package as a user gets it: what its wheel and its sdist hold, and whether each installs and converts."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
# What setuptools adds to an sdist.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|lsg_converter\.egg-info/.*")
LOAD = """
import importlib.util, sys
import torch, transformers
assert importlib.util.find_spec("lsg_converter") is None
model = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__name__ == "LSGBertModel"
with torch.no_grad():
    assert model(torch.full((1, 1000), 5)).last_hidden_state.isfinite().all()
"""
WHERE = "import importlib.util; print(importlib.util.find_spec('lsg_converter').origin)"


def main(folder: Path) -> None:
    """Build, compare, install and convert, all in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(*command: object) -> str:
        """Run a command, not in the checkout: that would lend it the package. Returns what it prints."""
        words = [str(word) for word in command]
        result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{result.stdout}{result.stderr}\nerror: exit code {result.returncode}: {' '.join(words)}")
        return result.stdout

    tracked = set(run("git", "-C", ROOT, "ls-files", "-z").split("\0")) - {""}
    checkout = folder / "checkout"
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    build = (sys.executable, "-m", "build", "--no-isolation", checkout, "--outdir")
    run(*build, folder / "dist")  # which makes the wheel of the sdist
    run(*build, folder / "direct", "--wheel")
    wheel, sdist = (next((folder / "dist").glob(f"*{ending}")) for ending in (".whl", ".tar.gz"))
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)

    files = files_of_wheel(wheel)
    assert files == files_of_wheel(folder / "direct" / wheel.name), "the sdist makes another wheel than the checkout"
    package = {name for name in tracked if name.startswith("lsg_converter/")}
    agree("wheel", {name for name in files if ".dist-info/" not in name}, package)
    agree("sdist", files_of_sdist(sdist), {name for name in tracked if not name.startswith(".")})
    version = wheel.name.split("-")[1]
    for name, line in (("CITATION.cff", f"version: {version}"), ("CHANGELOG.md", f"## {version} - ")):
        assert f"\n{line}" in (checkout / name).read_text(), f"{name} has no line {line!r}, as pyproject.toml's version"

    for archive in (wheel, sdist):
        fresh = folder / f"fresh{archive.suffix}"
        lend_dependencies(fresh)
        pip = (sys.executable, "-m", "pip", "--python", fresh / "bin" / "python")
        run(*pip, "install", "-q", "--no-index", "--no-build-isolation", archive)
        assert Path(run(fresh / "bin" / "python", "-c", WHERE)).is_relative_to(fresh), "another package is in the way"
        source, target = checkout / "tests" / "golden" / "bert" / "source", folder / f"lsg{archive.suffix}"
        flags = ("--initial_model", source, "--model_name", target, "--max_sequence_length", 1000, "--quiet")
        run(fresh / "bin" / "lsg-convert", *flags)
        assert json.loads((target / "lsg_conversion.json").read_text())["versions"]["lsg-converter"] == version
        run(*pip, "uninstall", "-q", "-y", "lsg-converter")
        run(fresh / "bin" / "python", "-c", LOAD, target)
        print(f"{archive.name}: installs, converts, and what it writes loads without it")


def files_of_wheel(path: Path) -> dict[str, bytes]:
    """What a wheel holds."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_of_sdist(path: Path) -> set[str]:
    """The files in an sdist but for those that setuptools adds."""
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    return {name for name in names if not GENERATED.fullmatch(name)}


def agree(what: str, actual: set[str], expected: set[str]) -> None:
    """Fail where an archive does not hold just what it should."""
    lacking, beyond = sorted(expected - actual), sorted(actual - expected)
    assert actual == expected, f"the {what} lacks {lacking}, and should not hold {beyond}"


def lend_dependencies(fresh: Path) -> None:
    """Make a virtual environment with links to all that is installed beside this interpreter, but for our package.

    So pip finds the dependencies there, and need not install them again.
    """
    venv.create(fresh)
    (site_packages,) = fresh.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "lsg_converter" not in path.name:
            (site_packages / path.name).symlink_to(path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lsg-package-") as folder:
        main(Path(folder))
