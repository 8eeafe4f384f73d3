"""A step and what it costs, for `benchmark.py`, and for the process in which the published implementation runs.

That process has other libraries, so this file imports torch alone. Started as a program, it reads a line of JSON that
says what to build, and then, line by line, what to measure; it answers each with a number.

    PYTHONPATH=FOLDER python experiments/efficiency/steps.py
"""

import ctypes
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], mode: str) -> float:
    """One forward pass or one training step; the seconds it took."""
    model.train(mode == "training")
    synchronize(inputs["input_ids"].device)
    start = perf_counter()
    with torch.set_grad_enabled(mode == "training"):
        loss = model(**inputs).last_hidden_state.float().square().mean()
    if mode == "training":
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronize(inputs["input_ids"].device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def new_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Forget gradients and the optimizer's state, so that the next step allocates them."""
    model.zero_grad()
    return torch.optim.Adam(model.parameters(), lr=1e-5)


def growth(run: Callable[[], object], device: str) -> int:
    """The bytes that `run` takes at its peak: of the device's memory, or, on a CPU, of this process's resident one."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with suppress(AttributeError, OSError):  # On Linux, what was taken and is free is given back first.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    run()
    return peak_resident() - before


def peak_resident() -> int:
    with suppress(OSError):  # On Linux; what `resource` says there counts the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build_published(job: dict[str, Any]) -> torch.nn.Module:
    """LSG-RoBERTa as lsg-converter 0.1.9 has it, with random weights."""
    module = importlib.import_module("lsg_converter.roberta.modeling_lsg_roberta")
    torch.manual_seed(0)
    model: torch.nn.Module = module.LSGRobertaModel(module.LSGRobertaConfig(**job["config"]), add_pooling_layer=False)
    return model.to(job["device"], getattr(torch, job["dtype"]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    job = json.loads(input())
    torch.set_num_threads(job["threads"])
    tokens = torch.tensor(job["tokens"], device=job["device"])
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor(job["mask"], device=job["device"])}
    # A short text on a small model loads what torch loads late.
    small = build_published(job | {"config": job["config"] | {"num_hidden_layers": 1}})
    optimizer = new_optimizer(small)
    step(small, optimizer, {name: x[:, :64] for name, x in inputs.items()}, "training")
    del small
    model = build_published(job)
    for line in sys.stdin:
        question, mode = line.split()
        optimizer = new_optimizer(model) if question == "first" else optimizer
        run = partial(step, model, optimizer, inputs, mode)
        print(growth(run, job["device"]) if question == "first" else run(), file=answers, flush=True)


if __name__ == "__main__":
    main()
