"""Encoders and decoders of checkpoints of their own, of which one has LSG, or both."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, run_command
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SpeechEncoderDecoderConfig,
    VisionEncoderDecoderConfig,
    VisionTextDualEncoderConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from lsg_converter import LSGEncoderDecoderModel, families
from lsg_converter.modeling import lsg_encoder_decoder
from lsg_converter.modeling.lsg_config import LSGSeq2SeqConfig


SMALL = {"block_size": 4, "sparse_block_size": 4, "num_global_tokens": 2}
PAIRS = [("lsg-bert", "lsg-roberta"), ("lsg-roberta", "lsg-bert"), ("lsg-bert", "bert"), ("roberta", "lsg-bert")]
ONE_BY_DEFAULT = [PAIRS[0], *(pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS[1:])]
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources by their names, and what the command made of them to 1,000 tokens."""
    result = {name: GOLDEN / name / "source" for name in ("bert", "roberta")}
    for name, source in list(result.items()):
        result[f"lsg-{name}"] = tmp_path_factory.mktemp("encoder-decoder") / f"lsg-{name}"
        flags = ("--max_sequence_length", "1000", "--quiet", "--no_verify")
        assert run_command(source, result[f"lsg-{name}"], *flags) == 0
    return result


@pytest.fixture
def build(folders):
    def build(encoder="lsg-bert", decoder="lsg-roberta", dtype=None, attn_implementation=None, **fields):
        options = {}
        for part, name in (("encoder", encoder), ("decoder", decoder)):
            lsg = {**SMALL, **fields} if name.startswith("lsg") else {}
            shared = {"attn_implementation": attn_implementation} if attn_implementation else {}
            options |= {f"{part}_{key}": value for key, value in {**lsg, **shared}.items()}
        torch.manual_seed(0)  # of the cross-attention, which is new
        model = LSGEncoderDecoderModel.from_encoder_decoder_pretrained(
            folders[encoder], folders[decoder], decoder_start_token_id=2, pad_token_id=1, **options
        )
        return model.to(dtype or torch.float32).eval()

    return build


def batch(tokens=50, real=31, written=29, left=False):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, real:] = 0
    mask = mask.flip(1) if left else mask
    labels = torch.randint(5, 120, (2, written), generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": labels}


def test_every_family_that_may_be_a_part_is_known():
    every = {families.family(name).config_class for name in families.model_types()}
    assert {c for c in every if not issubclass(c, LSGSeq2SeqConfig)} == set(lsg_encoder_decoder.FAMILIES)


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_short_texts_and_no_global_tokens_give_the_stock_model(build, folders, encoder, decoder):
    """With the same weights: logits, loss and gradients; positions of the text are as in the source."""
    model = build(encoder, decoder, block_size=64, num_global_tokens=0, sparse_block_size=64).double()
    stock = EncoderDecoderModel.from_encoder_decoder_pretrained(
        folders[encoder.removeprefix("lsg-")], folders[decoder.removeprefix("lsg-")]
    )
    stock.config.decoder_start_token_id, stock.config.pad_token_id = 2, 1
    stock = stock.double().eval()
    weights = model.state_dict()
    shapes = {name: len(tensor) for name, tensor in stock.state_dict().items() if tensor.dim()}
    stock.load_state_dict({name: weights[name][: shapes.get(name)] for name in stock.state_dict()})
    inputs = batch()
    outputs, expected = model(**inputs), stock(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=0, atol=1e-5)
    outputs.loss.backward(), expected.loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            grad = ours[name].grad[: len(parameter)]
            torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("encoder, decoder", PAIRS[:2])
def test_kernels_agree(build, encoder, decoder):
    inputs = batch()
    results = []
    for kernel in ("eager", "sdpa"):
        model = build(encoder, decoder, torch.float64, kernel)
        assert {model.config._attn_implementation, model.decoder.config._attn_implementation} == {"sdpa"} or (
            model.encoder.config._attn_implementation == kernel == model.decoder.config._attn_implementation
        )
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_outputs_have_the_positions_of_the_texts(build):
    model, inputs = build(attn_implementation="eager"), batch()
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert outputs.encoder_last_hidden_state.shape == (2, 50, 16) and outputs.logits.shape == (2, 29, 120)
    assert {state.shape for state in outputs.decoder_hidden_states} == {(2, 29, 16)}
    assert {a.shape for a in outputs.cross_attentions} == {(2, 4, 29, 50)}
    assert all(a[0, :, :, 31:].abs().max() == 0 for a in outputs.cross_attentions)


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_padding_of_the_encoder_changes_nothing(build, encoder, decoder):
    model = build(encoder, decoder, torch.float64)
    for left in (False, True):
        if left and encoder not in ("roberta", "lsg-roberta"):
            continue  # whose positions count from the edge, as in the stock model
        inputs = batch(left=left)
        alone = {"input_ids": inputs["input_ids"][:1, 19 if left else 0 :][:, :31], "labels": inputs["labels"][:1]}
        padded = model(**inputs).logits[:1]
        torch.testing.assert_close(padded, model(**alone).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_steps_with_a_cache_give_the_full_pass(build, encoder, decoder):
    """One by one, and several at once, about the edges of blocks of 4."""
    model, inputs = build(encoder, decoder, torch.float64), batch()
    ids = inputs.pop("labels")
    with torch.no_grad():
        full = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        for sizes in ([1] * 29, [7, 1, 1, 3, 4, 5, 8], [9, 20], [28, 1]):
            cache, encoded, parts, done = None, None, [], 0
            for size in sizes:
                outputs = model(
                    **inputs, encoder_outputs=encoded, decoder_input_ids=ids[:, done : done + size],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                cache, done = outputs.past_key_values, done + size
                encoded = encoded or (outputs.encoder_last_hidden_state,)
                parts.append(outputs.logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 1, "do_sample": True},
        {"num_beams": 1, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("encoder, decoder", ONE_BY_DEFAULT)
def test_generate(build, encoder, decoder, how, left):
    """With a cache and without, beyond two blocks, it writes the same."""
    model = build(encoder, decoder, torch.float64)
    inputs = batch(left=left)
    del inputs["labels"]
    results = []
    for cache in (True, False):
        torch.manual_seed(0)
        options = {key: value for key, value in how.items() if cache or key != "cache_implementation"}
        results.append(model.generate(**inputs, **options, max_new_tokens=21, min_new_tokens=21, use_cache=cache))
    assert results[0].shape == (2, 22) and torch.equal(*results)


def test_training_reaches_both_parts(build, tmp_path):
    model, inputs = build(), batch()
    model(**inputs).loss.backward()
    lacking = {name for name, p in model.named_parameters() if p.grad is None}
    assert lacking and all("pooler" in name for name in lacking)
    tables = [p.grad for name, p in model.named_parameters() if "global_embeddings" in name]
    assert len(tables) == 2 and all(table[:2].abs().sum(-1).gt(0).all() for table in tables)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    items = [{key: value[row] for key, value in inputs.items()} for row in (0, 1)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, report_to=[],
        use_cpu=True, save_strategy="no", predict_with_generate=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=items, eval_dataset=items)
    assert trainer.train().global_step == 2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == {"encoder", "decoder"}
    assert len(trainer.predict(items, max_new_tokens=11).predictions) == 2


def test_gradient_checkpointing_gives_the_same_gradients(build):
    model, inputs = build(dtype=torch.float64).train(), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, use_cache=False).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


SCRIPT = """
import json, os, sys
sys.modules["lsg_converter"] = None  # an import of it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
folder = sys.argv[1]
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs, logits = torch.load(folder + "/inputs.pt"), torch.load(folder + "/logits.pt")
assert torch.equal(model(**inputs).logits, logits)
model.save_pretrained(folder + "/again")
again = AutoModelForSeq2SeqLM.from_pretrained(folder + "/again", trust_remote_code=True).eval()
assert torch.equal(again(**inputs).logits, logits)
for part, auto_class in (("encoder", AutoModel), ("decoder", AutoModelForCausalLM)):
    getattr(again, part).save_pretrained(folder + "/" + part)
    alone = auto_class.from_pretrained(folder + "/" + part, trust_remote_code=True)
    assert type(alone).__name__ == type(getattr(model, part)).__name__
print(json.dumps([type(m).__name__ for m in (model, model.encoder, model.decoder)]))
"""


@pytest.mark.parametrize("encoder, decoder", ONE_BY_DEFAULT)
def test_saved_and_loaded_where_the_package_is_not(build, tmp_path, encoder, decoder):
    model, inputs = build(encoder, decoder), batch()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save(inputs, tmp_path / "inputs.pt"), torch.save(model(**inputs).logits, tmp_path / "logits.pt")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = [type(m).__name__ for m in (model, model.encoder, model.decoder)]
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    assert sum(name.startswith("LSG") for name in expected) == 1 + (encoder + decoder).count("lsg")
    content = (tmp_path / "config.json").read_text()
    assert "_name_or_path" not in content
    for load in (AutoModelForSeq2SeqLM.from_pretrained, EncoderDecoderModel.from_pretrained):
        with pytest.raises(ValueError, match="load it with trust_remote_code=True"):
            load(tmp_path)


def test_fields_and_kernel_can_be_changed_when_it_is_loaded(build, tmp_path):
    build().save_pretrained(tmp_path)
    changes = {"attn_implementation": "eager", "encoder": {"block_size": 8, "sparse_block_size": 8}}
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True, **changes)
    assert model.encoder.config.block_size == 8 and model.encoder.config.num_global_tokens == 2
    for config in (model.config, model.encoder.config, model.decoder.config):
        assert config._attn_implementation == "eager"
    for config, part in ((model.config.encoder, model.encoder), (model.config.decoder, model.decoder)):
        assert all(m.config is config for m in part.modules() if hasattr(m, "num_attention_heads"))
    with pytest.raises(Exception, match="block_size: got 0"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True, encoder={"block_size": 0})


def test_models_that_are_given(folders, tmp_path):
    """Of the code that lies in their folders."""
    encoder = AutoModel.from_pretrained(folders["lsg-bert"], trust_remote_code=True)
    decoder = AutoModelForCausalLM.from_pretrained(
        folders["lsg-bert"], trust_remote_code=True, is_decoder=True, add_cross_attention=True
    )
    model = LSGEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    assert model.encoder is encoder and model.config.decoder is decoder.config
    ids = batch()["input_ids"]
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, logits)


def test_configurations_of_transformers_refuse_lsg_parts(folders):
    """Which they would make stock parts of, from the fields, and then from what is saved."""
    config = AutoConfig.from_pretrained(folders["lsg-bert"], trust_remote_code=True)
    for make in (
        lambda: EncoderDecoderConfig.from_encoder_decoder_configs(config, config),
        lambda: EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(), config),
        lambda: EncoderDecoderConfig(encoder=config.to_dict(), decoder=BertConfig().to_dict()),
        lambda: VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), config),
        lambda: SpeechEncoderDecoderConfig.from_encoder_decoder_configs(Wav2Vec2Config(), config),
        lambda: VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(), config),
        lambda: AutoConfig.for_model(**config.to_dict()),
        lambda: BertConfig.from_dict(config.to_dict()),
    ):
        with pytest.raises(
            ValueError, match=r"^attn_implementation: .* LSGEncoderDecoderModel .*='sdpa' in its place$"
        ):
            make()
    stock = AutoConfig.for_model(**{**config.to_dict(), "attn_implementation": "sdpa"})
    assert type(stock) is BertConfig and stock.block_size == config.block_size
    ours = lsg_encoder_decoder.LSGEncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config))
    model = LSGEncoderDecoderModel(ours)
    assert type(model.encoder).__name__ == "LSGBertModel" and model.encoder.config._attn_implementation == "sdpa"
    assert model.config.encoder is model.encoder.config
    encoder = AutoModel.from_pretrained(folders["lsg-bert"], trust_remote_code=True)
    with pytest.raises(ValueError, match=r"a second time; LSGBertModel needs .* take LSGEncoderDecoderModel"):
        encoder.config = encoder.config  # as Transformers' model does where it has an LSG part


def test_what_cannot_be_is_said(folders, tmp_path):
    load = LSGEncoderDecoderModel.from_encoder_decoder_pretrained
    encoder = AutoModel.from_pretrained(folders["lsg-bert"], trust_remote_code=True)
    decoder = BertLMHeadModel.from_pretrained(folders["bert"], is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match=r"^attn_implementation: got the fields of an LSG.* LSGEncoderDecoderModel"):
        EncoderDecoderModel(encoder=encoder, decoder=decoder)
    with pytest.raises(ValueError, match=r"^block_size: got an unknown argument; .* encoder_ or decoder_"):
        load(folders["lsg-bert"], folders["lsg-bert"], block_size=4)
    with pytest.raises(ValueError, match=r"^decoder: got no checkpoint"):
        load(folders["lsg-bert"])
    for name in ("distilbert", "bart"):
        source = GOLDEN / name / "source"
        assert run_command(source, tmp_path / name, "--quiet", "--no_verify") == 0
    with pytest.raises(ValueError, match=r"^decoder: got a checkpoint of 'distilbert', which has no causal form"):
        load(folders["lsg-bert"], tmp_path / "distilbert")
    with pytest.raises(ValueError, match=r"^model_type: got an LSG checkpoint of 'bart'; .* one of albert, bert"):
        load(tmp_path / "bart", folders["lsg-bert"])
    with pytest.raises(ValueError, match=r"^attn_implementation: got an LSG checkpoint without .* convert it"):
        load(GOLDEN / "bert" / "published", folders["lsg-bert"])
    with pytest.raises(Exception, match=r"encoder: got no configuration"):
        lsg_encoder_decoder.LSGEncoderDecoderConfig(decoder=decoder.config)
