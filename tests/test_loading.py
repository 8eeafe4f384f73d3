"""A converted checkpoint loads where this package is not: from a folder, and through the cache of the Hub."""

import ast
import copy
import importlib.metadata
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertPreTrainedModel, EncoderDecoderModel, pipeline

from lsg_converter import families
from lsg_converter.modeling.lsg_classes import stock_class


SCRIPT = """
import json, sys
sys.modules["lsg_converter"] = None  # an import of it fails
import torch, transformers
names, auto_classes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name, auto_class in [(name, auto_class) for name in names for auto_class in auto_classes]:
    model = getattr(transformers, auto_class).from_pretrained(name, trust_remote_code=True, block_size=4,
                                                              sparse_block_size=4, sparsity_type="bos_pooling").eval()
    assert type(model).__name__.startswith("LSG"), type(model)
    ids = torch.arange(5, 45)[None]
    inputs = {"input_ids": ids[:, None] if auto_class == "AutoModelForMultipleChoice" else ids}
    if model.config.is_encoder_decoder:
        ids[0, -1] = model.config.eos_token_id
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        output = model(**inputs)[0]
    assert output.isfinite().all()
    if auto_class == "AutoModel":
        print(json.dumps(output[0, 7].tolist()))
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        assert tokenizer.model_max_length == 1000 and tokenizer("a")["input_ids"]
"""


def hub_cache(checkpoint: Path, home: Path, repository: str) -> None:
    """Lay out `checkpoint` as `huggingface_hub` does after a download: blobs, and links to them."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "refs", root / "blobs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = root / "blobs" / f"{number:040d}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.mark.few_families("bert")
def test_fresh_process(converted, tmp_path):
    names = [str(converted), "somebody/lsg-model-v1.5"]
    hub_cache(converted, tmp_path / "home", names[1])
    auto_classes = [c for c in json.loads((converted / "config.json").read_text())["auto_map"] if c != "AutoConfig"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names), json.dumps(auto_classes)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    model = AutoModel.from_pretrained(
        converted, trust_remote_code=True, block_size=4, sparse_block_size=4, sparsity_type="bos_pooling"
    ).eval()
    with torch.no_grad():
        expected = model(**inputs_of(model))[0][0, 7]
    lines = result.stdout.splitlines()
    assert len(lines) == len(names)
    for line in lines:
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=0, atol=1e-5)


def inputs_of(model):
    ids = torch.arange(5, 45)[None]
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    ids[0, -1] = model.config.eos_token_id
    return {"input_ids": ids, "decoder_input_ids": ids}


def test_without_the_flag_it_is_refused(converted, golden):
    """By every loader, and by a stock class; tokenizers and configurations load. Who wants a stock model says so."""
    stock = stock_class(families.family(golden.name.replace("_", "-")).base_class)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(converted), "target_modules": "all-linear"}
    folder = converted.parent / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    loaders = [
        AutoModel.from_pretrained,
        stock.from_pretrained,
        lambda name: pipeline("feature-extraction", model=str(name)),
        lambda name: AutoModel.from_config(AutoConfig.from_pretrained(name)),
        lambda name: AutoModel.from_pretrained(folder),
    ]
    if golden.name == "bert":
        loaders += [lambda name: SentenceTransformer(str(name)), lambda name: CrossEncoder(str(name))]
        loaders += [lambda name: EncoderDecoderModel.from_encoder_decoder_pretrained(name, name)]
    for load in loaders:
        with pytest.raises(ValueError, match=r"load it with trust_remote_code=True"):
            load(converted)
    assert AutoTokenizer.from_pretrained(converted).model_max_length == 1000
    assert type(stock.from_pretrained(converted, attn_implementation="sdpa")) is stock
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True)
    loaded = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=True)  # which chooses an implementation
    assert type(loaded).__name__ == f"LSG{stock.__name__}" and loaded.config._attn_implementation == "sdpa"
    for make in (stock, stock._from_config, lambda config: stock.from_pretrained(converted, config=config)):
        with pytest.raises(ValueError, match=r"load it with trust_remote_code=True"):
            make(copy.deepcopy(config))
    config.output_attentions = True
    assert config._attn_implementation == "eager"
    for kernel in (None, "eager"):
        model = AutoModel.from_pretrained(converted, trust_remote_code=True, attn_implementation=kernel)
        assert model.config._attn_implementation == (kernel or "sdpa")


def test_a_class_of_ones_own_around_lsg(converted, golden):
    """It says that it is a stock class, and what it holds is an LSG model."""
    if golden.name != "bert":
        pytest.skip("one family shows it")
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True)

    class Own(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = AutoModel.from_config(config, trust_remote_code=True)
            self.post_init()

    with pytest.raises(ValueError, match=r"load it with trust_remote_code=True"):
        Own.from_pretrained(converted, config=config)
    own = Own.from_pretrained(converted, config=config, attn_implementation="sdpa").eval()
    model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(own.bert(**inputs_of(model))[0], model(**inputs_of(model))[0])


@pytest.mark.few_families
def test_a_field_that_config_json_lacks(converted, tmp_path, caplog, monkeypatch):
    """Its default would be another model, silently."""
    folder = tmp_path / "lsg-model"
    shutil.copytree(converted, folder)
    content = json.loads((folder / "config.json").read_text())
    lsg_fields = families.family(content["model_type"]).lsg_fields
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to what catches the lines
    for name in (*lsg_fields, "max_position_embeddings"):
        (folder / "config.json").write_text(json.dumps({key: x for key, x in content.items() if key != name}))
        if name in ("full_attention_length", "position_step"):
            with caplog.at_level("WARNING"):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            assert getattr(config, name) == content[name]
            assert f"{name}: config.json lacks it; taken is {content[name]!r}, as in older" in caplog.messages[-1]
            continue
        with pytest.raises(ValueError, match=rf"^{name}: config.json lacks it; .* or give {name} when you load it$"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)
        given = AutoConfig.from_pretrained(folder, trust_remote_code=True, **{name: content[name]})
        assert getattr(given, name) == content[name]
    assert len(lsg_fields) > 10


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "6.0.0"])
def test_another_transformers_is_named_before_anything_else(monkeypatch, version):
    """By the file of ours that each family imports first."""
    modeling = Path(__file__).parents[1] / "lsg_converter" / "modeling"
    for path in modeling.glob("modeling_lsg_*.py"):
        ours = [node.module for node in ast.parse(path.read_text()).body if getattr(node, "level", 0)]
        assert next(name for name in ours if "transformers" in (modeling / f"{name}.py").read_text()) == "lsg_classes"
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    with pytest.raises(ImportError, match=rf"^transformers>=5.10,<6 is required .* found transformers=={version}\.$"):
        runpy.run_path(str(modeling / "lsg_classes.py"))


def test_two_folders_with_one_name(converted, tmp_path):
    """Each runs its own code."""
    models = []
    for place in ("a", "b"):
        folder = tmp_path / place / "lsg-model"
        shutil.copytree(converted, folder)
        if place == "b":
            code = (folder / "lsg_config.py").read_text()
            (folder / "lsg_config.py").write_text(
                code.replace("MAX_GLOBAL_TOKENS = 512", "MAX_GLOBAL_TOKENS = 512 \nMARK = 1")
            )
        models.append(AutoModel.from_pretrained(folder, trust_remote_code=True).eval())
    modules = [sys.modules[type(model).__module__.rsplit(".", 1)[0] + ".lsg_config"] for model in models]
    assert not hasattr(modules[0], "MARK") and hasattr(modules[1], "MARK")
    with torch.no_grad():
        assert torch.equal(*(model(**inputs_of(model))[0] for model in models))


def test_shipped_files_are_those_of_the_package(converted):
    package = Path(__file__).parents[1] / "lsg_converter" / "modeling"
    for path in converted.glob("*.py"):
        assert path.read_bytes() == (package / path.name).read_bytes()
