"""Measure the ONNX graph of a converted encoder beside the model: one text, by length, float32.

    lsg-convert --initial_model MODEL --model_name lsg-model --export onnx
    python experiments/efficiency/onnx_graph.py lsg-model

In each round both read the same text in turn, so that noise hits both alike.
"""

import argparse
import statistics
import time
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoConfig, AutoModel


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint with onnx/model.onnx")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    options = parser.parse_args()
    graph = options.folder / "onnx" / "model.onnx"
    if not graph.is_file():
        parser.exit(2, f"error: got {options.folder}, without onnx/model.onnx; convert with --export onnx\n")
    limit = AutoConfig.from_pretrained(options.folder, trust_remote_code=True).max_position_embeddings
    if not 0 < min(options.lengths) <= max(options.lengths) <= limit or options.rounds < 1:
        parser.exit(2, f"error: --lengths: got {options.lengths}; give lengths from 1 to {limit}, and rounds\n")
    model = AutoModel.from_pretrained(options.folder, trust_remote_code=True, dtype=torch.float32).eval()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    print(f"{torch.get_num_threads()} threads, float32; milliseconds, medians of {options.rounds} rounds")
    print(f"{'tokens':>8s}{'PyTorch':>10s}{'ONNX':>10s}{'ONNX / PyTorch':>16s}")
    for tokens in options.lengths:
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        text = {name: every[name] for name in names}
        arrays = {name: value.numpy() for name, value in text.items()}
        seconds = []
        for _ in range(options.rounds + 1):  # the first one warms up
            start = time.perf_counter()
            model(**text)
            middle = time.perf_counter()
            session.run(None, arrays)
            seconds.append((middle - start, time.perf_counter() - middle))
        own, other = (1000 * statistics.median(column) for column in zip(*seconds[1:], strict=True))
        print(f"{tokens:8,d}{own:10.0f}{other:10.0f}{statistics.median(b / a for a, b in seconds[1:]):16.2f}")


if __name__ == "__main__":
    main()
