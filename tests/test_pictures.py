"""The pictures of `docs/draw.py`: what they show is what attention sees and what the sparsifiers make."""

import importlib.util
import string
import sys
from pathlib import Path

import pytest
import torch

from lsg_converter.modeling.lsg_attention import lsg_attention
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES, sparsify


sys.path.append(str(Path(__file__).parents[1] / "docs"))

import draw


pytestmark = pytest.mark.newest


@pytest.mark.parametrize("name", ["FULL", "LOCAL", "LSG"])
def test_what_is_drawn_as_seen_is_what_attention_sees(name):
    """With values that are one-hot, the output of a query holds the probabilities of the tokens."""
    layout = getattr(draw, name)
    *tensors, mask = draw.random_text(layout, draw.LENGTH, 1)
    output, _ = lsg_attention(*tensors, mask[0], **layout._asdict(), kernel="eager")
    seen = draw.seen_keys(layout, draw.LENGTH)
    assert torch.equal(seen > 0, output[0, 0] > 0)
    block = (torch.arange(len(seen)) - layout.num_global_tokens) // layout.block_size
    for query, kinds in enumerate(seen):
        for key, kind in enumerate(kinds):
            if kind != draw.UNSEEN:
                distance = block[key] - block[query]
                expected = draw.LOCAL_KEY if abs(distance) < 2 else draw.LEFT_KEY if distance < 0 else draw.RIGHT_KEY
                assert kind == (draw.GLOBAL_KEY if min(query, key) < layout.num_global_tokens else expected)


@pytest.fixture
def figures(monkeypatch):
    """What is saved, by its name."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, save = {}, figure.savefig

    def keep(self, path):
        saved[path.name] = self
        save(self, path)

    monkeypatch.setattr(figure, "savefig", keep)
    return saved


def test_the_pictures_hold_it(tmp_path, figures):
    assert draw.main(["--output", str(tmp_path / "img")]) == 0
    assert {path.name for path in (tmp_path / "img").iterdir()} == set(figures) == {"attention.png", "sparsity.png"}

    axes = figures["attention.png"].axes
    matrices = [panel.images[0].get_array() for panel in axes if panel.images]
    for matrix, layout in zip(matrices, (draw.FULL, draw.LOCAL, draw.LSG), strict=True):
        assert matrix.tolist() == draw.seen_keys(layout, draw.LENGTH).tolist()
    labels = [label.get_text() for panel in axes if panel.get_legend() for label in panel.get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == ["2", "12", "4", "4"]

    layout = draw.SPARSIFIERS
    query, key, _, mask = draw.random_text(layout, draw.NUM_BLOCKS * layout.block_size, draw.HEADS)
    panels = figures["sparsity.png"].axes
    assert [panel.get_title("left").split(":")[0] for panel in panels] == [*SPARSITY_TYPES[1:]]
    for panel, sparsity_type in zip(panels, SPARSITY_TYPES[1:], strict=True):
        sparse = sparsify(query, key, key, mask, layout, sparsity_type=sparsity_type)
        drawn = torch.zeros_like(sparse.key)
        for letter in panel.texts:
            token, head = letter.get_position()
            place = string.ascii_uppercase.index(letter.get_text())
            drawn[0, head, place] += abs(panel.images[0].get_array()[head, token]) * key[0, head, token]
        torch.testing.assert_close(drawn, sparse.key * sparse.mask[..., None])


@pytest.mark.parametrize(
    ("absent", "code", "message"), [(True, 1, "matplotlib is missing; "), (False, 2, "--output: ")]
)
def test_what_cannot_be_drawn_is_one_line(absent, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if absent else object())
    file = tmp_path / "file"
    file.touch()
    assert draw.main(["--output", str(file)]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
