"""Encode a corpus on many machines, with Ray Data (`pip install "ray[data]"`); on one machine it runs as it is.

Ray gives each worker a copy of the model, hands it texts, and writes these with their vectors as Parquet. `encode.py`
needs no Ray, and goes on where it was stopped; this script begins anew.

    python experiments/retrieval/encode_ray.py --model lsg-minilm --trust_remote_code --texts texts.jsonl \\
        --workers 2 --output out/vectors
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).parents[1]))

import common


@dataclass
class RayArguments:
    """What is encoded, with what."""

    model: str = field(metadata={"help": "A sentence model, which every machine can read: a folder, or a name."})
    texts: str = field(metadata={"help": "A .jsonl file, or a folder of them, with a text in each line."})
    output: str = common.flag("The folder of Parquet files; it must not be there yet.", "out/vectors")
    trust_remote_code: bool = common.flag("Run the LSG code that lies beside the weights.", False)
    text_column_name: str = common.flag("The column of texts.", "text")
    batch_size: int = common.flag("Texts that a worker reads at once.", 8)
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
    data = common.need("ray.data")
    if Path(options.output).exists():
        raise common.OptionError(f"--output: {options.output!r} is there; give another folder")
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
