"""Checkpoints that the published implementation wrote convert into ones that load today."""

import json

import pytest
import torch
from conftest import GOLDEN, Golden, run_command
from safetensors.torch import load_file

from lsg_converter import families


FAMILIES = ["bert", "roberta", "bart"]


@pytest.fixture(params=FAMILIES)
def published(request, tmp_path):
    """The folder of a published checkpoint with its source's tokenizer, and the recorded numbers."""
    import shutil

    folder = tmp_path / "published"
    shutil.copytree(GOLDEN / request.param / "published", folder)
    for path in (GOLDEN / request.param / "source").glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder, Golden(request.param)


def load(folder):
    content = json.loads((folder / "config.json").read_text())
    family = families.family(content["model_type"])
    auto_class = families.auto_class(family.auto_class(family.lsg_class(content["architectures"][0])))
    return auto_class.from_pretrained(folder, trust_remote_code=True).eval()


def tables(folder):
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if "global_embeddings" in name]
    positions = [weights[name] for name in weights if "position" in name]
    return weights[name], positions


def test_resized_it_gives_the_same(published, tmp_path):
    source, golden = published
    assert run_command(source, tmp_path / "lsg", "--resize_lsg", "--max_sequence_length", "2100") == 0
    model = load(tmp_path / "lsg")
    assert not hasattr(model.config, "base_model_prefix") or model.config.base_model_prefix != "lsg"
    for field in ("block_size", "num_global_tokens", "sparsity_type"):
        assert getattr(model.config, field) == json.loads((source / "config.json").read_text())[field]
    inputs = golden.tensors("published.in.")
    with torch.no_grad():
        actual = model(**inputs)
    for field, expected in golden.tensors("published.out.").items():
        result = actual[field]
        if result.shape[:2] == inputs["attention_mask"].shape:
            real = inputs["attention_mask"].bool()
            result, expected = result[real], expected[real]
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)
    (old, old_positions), (new, new_positions) = tables(source), tables(tmp_path / "lsg")
    assert torch.equal(old, new)
    for before, after in zip(old_positions, new_positions, strict=True):
        assert len(after) - len(before) == 1100 and torch.equal(after[: len(before)], before)


def test_the_first_global_token_can_be_kept(published, tmp_path, capsys):
    source, _ = published
    assert run_command(source, tmp_path / "first", "--keep_first_global_token") == 0
    assert "512 rows rebuilt but for the first, " in capsys.readouterr().out
    assert run_command(source, tmp_path / "none", "--rebuild_global_tokens") == 0
    old, first, none = (tables(folder)[0] for folder in (source, tmp_path / "first", tmp_path / "none"))
    assert torch.equal(first[0], old[0]) and torch.equal(first[1:], none[1:])


def test_flags_for_lsg_checkpoints_are_refused_elsewhere(published, tmp_path, capsys):
    _, golden = published
    for flags, message in (
        (["--resize_lsg"], "--resize_lsg: "),
        (["--keep_first_global_token"], "--keep_first_global_token: "),
        (["--rebuild_global_tokens"], "--rebuild_global_tokens: "),
        (["--resize_lsg", "--keep_first_global_token"], "--resize_lsg: got --keep_first_global_token as well"),
    ):
        assert run_command(golden.source, tmp_path / "lsg", *flags) == 2
        assert message in capsys.readouterr().err


def test_what_becomes_of_the_global_tokens_must_be_said(published, tmp_path, capsys):
    source, _ = published
    assert run_command(source, tmp_path / "lsg") == 2
    message = capsys.readouterr().err
    assert "is an LSG checkpoint already" in message and "--resize_lsg keeps them" in message
    assert not (tmp_path / "lsg").exists()


def test_pickles_load_by_a_flag_alone(published, tmp_path, capsys):
    source, _ = published
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    expected = tables(source)[0]
    (source / "model.safetensors").unlink()
    assert run_command(source, tmp_path / "lsg", "--resize_lsg") == 3
    assert "safetensors" in capsys.readouterr().err
    assert run_command(source, tmp_path / "lsg", "--resize_lsg", "--allow_pickle") == 0
    assert torch.equal(tables(tmp_path / "lsg")[0], expected)


def test_a_pickle_with_values_that_are_not_finite(published, tmp_path, capsys):
    source, _ = published
    state = load_file(source / "model.safetensors")
    next(iter(state.values())).view(-1)[0] = float("inf")
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert run_command(source, tmp_path / "lsg", "--resize_lsg", "--allow_pickle") == 3
    assert "values that are not finite" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_cannot_run_code(published, tmp_path, capsys, monkeypatch):
    source, _ = published
    (source / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, source / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    assert run_command(source, tmp_path / "lsg", "--resize_lsg", "--allow_pickle") == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
