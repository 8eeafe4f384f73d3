"""What people use a checkpoint with: pipelines, Trainer, PEFT, devices, pickles."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lsg_converter import families


SEQ2SEQ = ("bart", "mbart", "pegasus")
TEXT = "word " * 600  # more than 512 tokens of every recorded tokenizer


def test_pipelines(converted, golden):
    if golden.name == "pegasus":
        pytest.skip("the stock model asks for decoder_input_ids, which the pipeline does not give")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokens = len(tokenizer(TEXT)["input_ids"])
    assert 512 < tokens < 1000

    def run(task, text=TEXT, **kwargs):
        return pipeline(task, model=str(converted), trust_remote_code=True)(text, **kwargs)

    states = torch.tensor(run("feature-extraction"))
    assert states.shape[1] == tokens and states.isfinite().all()
    if golden.name in SEQ2SEQ:
        return
    (label,) = run("text-classification")
    assert label["label"] in ("LABEL_0", "LABEL_1") and 0.5 <= label["score"] <= 1
    assert run("token-classification")[-1]["end"] > len(TEXT) - 10
    guesses = run("fill-mask", f"{TEXT} {tokenizer.mask_token}", top_k=3)
    assert len(guesses) == 3 and guesses[0]["score"] >= guesses[1]["score"] > 0


def states(model):
    ids = torch.arange(5, 65)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **more)[0]


def test_pickles_and_copies(converted):
    model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert torch.equal(states(again), states(model))


@pytest.mark.few_families
def test_a_pickle_is_read_by_another_process(converted, tmp_path):
    """Every class of the model stands in its module before a model was made there."""
    model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    torch.save((model, states(model)), tmp_path / "model.pt")
    code = """
import sys, torch
from transformers.dynamic_module_utils import init_hf_modules

init_hf_modules()  # which makes the cache of remote code importable
model, expected = torch.load(sys.argv[1], weights_only=False)
ids = torch.arange(5, 65)[None]
more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
with torch.no_grad():
    assert torch.equal(model(ids, **more)[0], expected)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_device_map(converted, tmp_path):
    """What does not fit into memory lies on disk."""
    config = json.loads((converted / "config.json").read_text())
    names = [name for name, target in config["auto_map"].items() if target.endswith(f".{config['architectures'][0]}")]
    auto_class = families.auto_class(names[0])
    model = auto_class.from_pretrained(converted, trust_remote_code=True).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    for arguments in ({"device_map": "cpu"}, {"device_map": "auto", "max_memory": {"cpu": size * 2 // 3}}):
        mapped = auto_class.from_pretrained(converted, trust_remote_code=True, offload_folder=tmp_path, **arguments)
        assert ("disk" in getattr(mapped, "hf_device_map", {}).values()) is ("max_memory" in arguments)
        assert torch.equal(states(mapped.eval()), states(model))


class LateEvidence(torch.utils.data.Dataset):
    """Texts of 640 tokens whose class shows at tokens 520 to 630 alone, by one of two `words`."""

    def __init__(self, vocabulary, words):
        self.vocabulary, self.words = vocabulary, words

    def __len__(self):
        return 48

    def __getitem__(self, index):
        ids = torch.randint(20, self.vocabulary, (640,), generator=torch.Generator().manual_seed(index))
        ids[520:630] = self.words[index % 2]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2}


def everything(model):
    return model


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))


def globals_and_head(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("global_embeddings", "pooler", "classifier")))
    return model


@pytest.mark.newest
@pytest.mark.parametrize(
    ("prepare", "learning_rate"),
    [
        (everything, 2e-4),
        pytest.param(lora, 1e-2, marks=pytest.mark.full),
        pytest.param(globals_and_head, 1e-2, marks=pytest.mark.full),
    ],
)
def test_training_finds_evidence_beyond_token_512(lsg_minilm, prepare, learning_rate, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        lsg_minilm, trust_remote_code=True, attention_probs_dropout_prob=0.0, num_global_tokens=16
    )
    words = AutoTokenizer.from_pretrained(lsg_minilm).convert_tokens_to_ids(["terrible", "excellent"])
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, learning_rate=learning_rate, logging_steps=2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=prepare(model), args=arguments, train_dataset=LateEvidence(model.config.vocab_size, words))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
