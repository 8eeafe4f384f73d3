"""What people use a checkpoint with: pipelines, Trainer, PEFT, devices, pickles."""

import copy
import json
import pickle
import subprocess
import sys

import accelerate
import pytest
import torch
from conftest import GOLDEN, run_command
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from sentence_transformers import SentenceTransformer
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lsg_converter import families


SEQ2SEQ = ("bart", "mbart", "pegasus")
SMALL = {"block_size": 4, "sparse_block_size": 4}
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


@pytest.fixture(scope="module")
def lsg_bert(tmp_path_factory):
    target = tmp_path_factory.mktemp("bert") / "lsg-bert"
    assert run_command(GOLDEN / "bert" / "source", target, "--quiet", "--no_verify") == 0
    return target


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


@pytest.mark.few_families("bert")
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


@pytest.mark.newest
@pytest.mark.full
def test_worker_processes_of_sentence_transformers(lsg_bert):
    """They are spawned, and get the model as a pickle."""
    model = SentenceTransformer(str(lsg_bert), trust_remote_code=True, device="cpu")
    texts = [TEXT[: 5 * length] for length in (5, 300, 400, 1)]
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeddings = model.encode(texts, pool=pool, chunk_size=2, convert_to_tensor=True)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(embeddings, model.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-5)


def loss_of(model, rows):
    """On rows of 60 tokens, as many as there are numbers in `rows`."""
    ids = torch.arange(5, 65)[None] + torch.tensor(rows)[:, None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(ids, **more)[0].square().mean()


def train_step(model, rows):
    loss_of(model, rows).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load_for_training(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **SMALL).eval()


def train_sharded(rank, folder, target):
    distributed.init_process_group("gloo", init_method=f"file://{target}/meeting", rank=rank, world_size=2)
    model = load_for_training(folder)
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module)
    fully_shard(model)
    train_step(model, [rank])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(weights, target / "weights.pt")
    distributed.destroy_process_group()


@pytest.mark.newest
@pytest.mark.full
def test_fully_sharded_training(converted, golden, tmp_path):
    """Two processes with a row each make the step that one makes with both."""
    if golden.name not in ("bert", "bart"):
        pytest.skip("one family of each build is enough")
    torch.multiprocessing.spawn(train_sharded, (converted, tmp_path), nprocs=2)
    alone, again = load_for_training(converted), load_for_training(converted)
    before = loss_of(alone, [0, 1])
    train_step(alone, [0, 1])
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert loss_of(alone, [0, 1]) < before - 1e-3
    torch.testing.assert_close(loss_of(again, [0, 1]), loss_of(alone, [0, 1]), rtol=0, atol=1e-5)


def test_what_must_not_be_split_is_as_in_the_stock_model(converted, golden):
    """By the names that the classes have in the model: device maps and FSDP look for them."""
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True)
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        if golden.name == "pegasus" and auto_class is not AutoModel:
            continue  # which has no such head
        model = auto_class.from_config(copy.deepcopy(config), trust_remote_code=True)
        stock = auto_class.from_config(AutoConfig.from_pretrained(golden.source))
        names = model._no_split_modules
        assert {name.removeprefix("LSG") for name in names} == stock._no_split_modules
        assert names <= {type(module).__name__ for module in model.modules()}


def place(module, name, device, *args, **kwargs):
    """As accelerate's `set_module_tensor_to_device`, for tensors that are fake."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tensors = owner._parameters if leaf in owner._parameters else owner._buffers
    moved = tensors[leaf].detach().to(device)
    tensors[leaf] = torch.nn.Parameter(moved, requires_grad=False) if tensors is owner._parameters else moved


def test_two_devices(converted, golden, monkeypatch):
    """Fake tensors know a second CPU, and refuse an operation on both."""
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True, attn_implementation="eager", **SMALL)
    whole = AutoModel.from_config(config, trust_remote_code=True)
    if not whole._no_split_modules:
        pytest.skip("the stock model takes no device map")
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", place)
    size, seen = sum(parameter.nbytes for parameter in whole.parameters()), []
    for percent in range(2, 190, 6):
        memory = {0: size * percent // 100, 1: 2 * size}
        parts = accelerate.infer_auto_device_map(whole, memory, whole._no_split_modules)
        if len(set(parts.values())) < 2 or parts in seen:
            continue
        seen.append(parts)
        devices = {name: f"cpu:{number}" for name, number in parts.items()}
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = AutoModel.from_config(config, trust_remote_code=True).eval()
            accelerate.big_modeling.attach_align_device_hook_on_blocks(
                model, {"": "cpu:0", **devices}, offload=dict.fromkeys(devices, False)
            )
            ids = torch.ones(2, 30, dtype=torch.long, device="cpu:0")
            more = {"decoder_input_ids": ids, "use_cache": False} if config.is_encoder_decoder else {}
            assert model(ids, torch.ones_like(ids), **more)[0].shape == (2, 30, config.hidden_size)
    assert seen


def test_device_map(converted, tmp_path):
    """What does not fit into memory lies on disk."""
    config = json.loads((converted / "config.json").read_text())
    names = [name for name, target in config["auto_map"].items() if target.endswith(f".{config['architectures'][0]}")]
    auto_class = families.auto_class(names[0])
    model = auto_class.from_pretrained(converted, trust_remote_code=True).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with_disk = {"device_map": "auto", "max_memory": {"cpu": size * 2 // 3}}
    if any("Embeddings" in name for name in model._no_split_modules):
        # Transformers infers no map, as little as of the stock model: most of it are embeddings, which stay whole.
        base, prefix = model.base_model, model.base_model_prefix
        places = {f"{prefix}.{name}": "disk" if name == "encoder" else "cpu" for name, _ in base.named_children()}
        heads = {name: "cpu" for name, _ in model.named_children() if name != prefix}
        with_disk = {"device_map": {**places, **heads}}
    for arguments in ({"device_map": "cpu"}, with_disk):
        mapped = auto_class.from_pretrained(converted, trust_remote_code=True, offload_folder=tmp_path, **arguments)
        assert ("disk" in getattr(mapped, "hf_device_map", {}).values()) is (arguments is with_disk)
        assert torch.equal(states(mapped.eval()), states(model))


ADAPTERS = {
    "prefix tuning": (PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "prompt tuning": (PromptTuningConfig, {"num_virtual_tokens": 3}),
    "p-tuning": (PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "IA3": (IA3Config, {}),
    "DoRA": (LoraConfig, {"use_dora": True}),
    "VeRA": (VeraConfig, {"r": 4}),
    "AdaLoRA": (AdaLoraConfig, {"total_step": 10}),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(lsg_bert, name, masked, tmp_path):
    def base():
        torch.manual_seed(0)  # of the head
        return AutoModelForSequenceClassification.from_pretrained(lsg_bert, trust_remote_code=True, **SMALL)

    config_class, options = ADAPTERS[name]
    model = get_peft_model(base(), config_class(task_type="SEQ_CLS", **options)).eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    ids = torch.arange(5, 35)[None].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -5:] = 0
    first = model(**inputs).loss
    for _ in range(2):  # What begins as zero lets no gradient through in the first step.
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trained.values())
    logits = model(**inputs).logits
    assert not torch.allclose(model(**inputs).loss, first, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    del inputs["labels"]  # In a loss AdaLoRA looks for what is trained.
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-6)


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
@pytest.mark.full
@pytest.mark.parametrize(("prepare", "learning_rate"), [(everything, 2e-4), (lora, 1e-2), (globals_and_head, 1e-2)])
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
