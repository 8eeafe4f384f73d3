"""The Hub kernel: made by its script, it needs torch alone, and Transformers loads it by `kernels`, offline."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    LlamaConfig,
    modeling_flash_attention_utils,
)
from transformers.integrations import hub_kernels

from lsg_converter import register_attention


pytestmark = pytest.mark.newest
SCRIPT = Path(__file__).parents[1] / "hub_kernel" / "make.py"
NAME = "owner/lsg:lsg_attention"
FIELDS = {"block_size": 4, "sparse_block_size": 4}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The folder of the repository."""
    output = tmp_path_factory.mktemp("kernel")
    runpy.run_path(str(SCRIPT))["make"](output)
    return output


@pytest.fixture
def llama(kernel, monkeypatch):
    kernels = pytest.importorskip("kernels")
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setenv("LOCAL_KERNELS", f"owner/lsg={kernel}")
    if not hub_kernels.is_kernels_available():  # of another version than Transformers asks for
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    register_attention("lsg")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, intermediate_size=40, lsg=FIELDS, **sizes)
    return AutoModel.from_config(config, attn_implementation=NAME).double().eval()


def test_it_is_what_the_package_registers(llama):
    """Whether texts are padded or not, over the whole text and in steps with a cache."""
    ids = torch.randint(5, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :9] = padded[2, 22:] = 0
    for mask in (None, torch.ones_like(ids), padded):
        results = []
        for name in (NAME, "lsg"):
            llama.set_attn_implementation(name)
            whole = llama(ids, attention_mask=mask).last_hidden_state
            start = llama(ids[:, :20], attention_mask=None if mask is None else mask[:, :20], use_cache=True)
            rest = llama(ids[:, 20:], attention_mask=mask, past_key_values=start.past_key_values).last_hidden_state
            results.append(torch.cat([whole, rest], dim=1))
        kept = 1 if mask is None else torch.cat([mask, mask[:, 20:]], dim=1)[..., None]
        torch.testing.assert_close(results[0] * kept, results[1] * kept, rtol=0, atol=1e-12)
    llama.set_attn_implementation("sdpa")
    assert not torch.allclose(whole, llama(ids, attention_mask=mask).last_hidden_state, atol=1e-3)


def test_texts_end_to_end_are_refused(llama):
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with pytest.raises(ValueError, match=r"^position_ids: they end before the keys do; LSG takes no texts that stand"):
        llama(torch.arange(30)[None] + 5, position_ids=positions, use_cache=False)


@pytest.mark.full
def test_a_model_compiles_as_one_graph(llama):
    ids = torch.arange(30)[None] + 5
    torch._dynamo.reset()
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    output, expected = (x(ids, use_cache=False).last_hidden_state for x in (compiled, llama))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"^position_ids: they end before the keys do"):
        compiled(ids, position_ids=torch.arange(30)[None] % 18, use_cache=False)
    torch._dynamo.reset()


def test_it_imports_torch_alone(kernel):
    variants = sorted(path.name for path in (kernel / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm"]
    code = f"""
import importlib, sys
sys.modules["transformers"] = sys.modules["lsg_converter"] = None
sys.path[:0] = [{str(kernel / "torch-ext")!r}, {str(kernel / "build")!r}]
for name in ("lsg", "torch-cpu"):
    module = importlib.import_module(name)
    assert module.flash_attn_forward is module.lsg_attention
    assert not hasattr(module, "supports_flash_attn") and not hasattr(module, "flash_attn_varlen_func")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})
    assert {path.name for path in (kernel / "torch-ext" / "lsg").glob("*.py")} == {
        path.name for path in (kernel / "build" / "torch-cuda").glob("*.py")
    }
