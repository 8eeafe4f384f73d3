"""Encode a corpus on many machines, with Ray Data (`pip install "ray[data]"`); on one machine it runs as it is.

Ray gives each worker a copy of the model, hands it texts, and writes these with their vectors as Parquet. Every machine
must be able to read the model and the texts, which may be a folder of .jsonl files. `encode.py` needs no Ray, and goes
on where it was stopped; this script begins anew, and wants a folder that is not there yet.

    python experiments/retrieval/encode_ray.py --model lsg-minilm --trust_remote_code --texts texts.jsonl \\
        --workers 2 --output out/vectors
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).parents[1]))

import common
from encode import CorpusArguments, load


@dataclass
class RayArguments(CorpusArguments):
    """How the work is shared."""

    workers: int = common.flag("Copies of the model.", 1)
    num_gpus: float = common.flag("GPUs of a worker.", 0.0)


class Encoder:
    """A worker's copy of the model."""

    def __init__(self, name: str, trust_remote_code: bool, column: str, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(name, trust_remote_code=trust_remote_code)
        self.column, self.batch_size = column, batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = list(batch[self.column])
        vectors = self.model.encode_document(texts, batch_size=self.batch_size, show_progress_bar=False)
        return {**batch, "vector": vectors}


@common.command
def main(flags: Sequence[str]) -> None:
    (options,) = common.parse_flags([RayArguments], flags)
    data = common.need("ray.data", "ray[data]")
    if Path(options.output).exists():
        raise common.OptionError(f"--output: {options.output!r} is there; give another folder")
    load(options, "cpu", "batch_size", "workers")  # so that a mistake is one line here, and not a worker's traceback
    rows = data.read_json(str(Path(options.texts).absolute()), lines=True)
    if options.text_column_name not in (columns := rows.columns()):
        raise common.OptionError(
            f"--text_column_name: got {options.text_column_name!r}; there are {', '.join(columns)}"
        )
    name = options.model if not Path(options.model).exists() else str(Path(options.model).absolute())
    encoder = (name, options.trust_remote_code, options.text_column_name, options.batch_size)
    encoded = rows.map_batches(
        Encoder,
        fn_constructor_args=encoder,
        batch_size=8 * options.batch_size,
        compute=data.ActorPoolStrategy(size=options.workers),
        num_gpus=options.num_gpus,
    )
    encoded.write_parquet(str(Path(options.output).absolute()))


if __name__ == "__main__":
    sys.exit(main())
