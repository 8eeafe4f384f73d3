"""The model card: what a reader of the repository needs, with code that can be pasted."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .report import ConversionReport


TEMPLATE = Path(__file__).with_name("model_card.md")
# What of the source's metadata is true of the long model too. Results and widgets are not.
KEPT = ("language", "license", "license_name", "license_link", "datasets", "pipeline_tag", "library_name")


def write_card(report: ConversionReport, source: Path, folder: Path, name: str) -> None:
    """Write `README.md` for the checkpoint in `folder`, which is loaded by `name`; `source` is the source's folder."""
    card = ModelCard.from_template(
        metadata(report, source),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        report=report,
        title=name.split("/")[-1],
        source=f"[{report.source}](https://huggingface.co/{report.source})" if report.revision else report.source,
        usage=usage(report, name),
    )
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def metadata(report: ConversionReport, source: Path) -> ModelCardData:
    """The front matter."""
    try:
        known = metadata_load(source / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        known = {}
    values: dict[str, Any] = {name: known[name] for name in KEPT if known.get(name)}
    tags = known.get("tags") or []
    values["tags"] = [*(tags if isinstance(tags, list) else [tags]), "lsg", "long-context"]
    values["library_name"] = values.get("library_name") or "transformers"
    base = report.source if report.revision else known.get("base_model")
    return ModelCardData(base_model=base, **values)


def usage(report: ConversionReport, name: str) -> str:
    """Code that loads the checkpoint and reads a long text."""
    name = json.dumps(name, ensure_ascii=False)
    if report.sentence_class:
        call = 'embeddings = model.encode(["A long document. " * 500, "Another one."])'
        if report.sentence_class == "CrossEncoder":
            call = 'scores = model.predict([("Which one is long?", "A long document. " * 500)])'
        elif report.sentence_class == "MultiVectorEncoder":
            call = 'embeddings = model.encode_document(["A long document. " * 500, "Another one."])'
        return "\n".join(
            [
                f"from sentence_transformers import {report.sentence_class}",
                "",
                f"model = {report.sentence_class}({name}, trust_remote_code=True)",
                call,
            ]
        )
    loads = [f"model = {report.auto_class}.from_pretrained({name}, trust_remote_code=True)"]
    if report.has_tokenizer:
        imports = f"from transformers import {', '.join(sorted([report.auto_class, 'AutoTokenizer'], key=str.lower))}"
        loads.append(f"tokenizer = AutoTokenizer.from_pretrained({name})")
        inputs = 'dict(tokenizer("A long document. " * 500, truncation=True, return_tensors="pt"))'
    else:
        imports = f"import torch\nfrom transformers import {report.auto_class}"
        inputs = f'{{"input_ids": torch.randint(10, 20, (1, {min(report.positions, 600)}))}}'
    call = "outputs = model(**inputs)"
    if report.auto_class == "AutoModelForMultipleChoice":
        call = "outputs = model(**{name: value[:, None] for name, value in inputs.items()})"
    elif report.auto_class == "AutoModelForSeq2SeqLM":
        call = "outputs = model.generate(**inputs, max_new_tokens=20)"
    elif report.auto_class == "AutoModel" and "pass_global_tokens_to_decoder" in report.lsg:
        call = 'outputs = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :1])'
    return "\n".join([imports, "", *loads, f"inputs = {inputs}", call])
