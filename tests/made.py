"""Small random checkpoints of the families for which no numbers are recorded, made when a test asks for one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lsg_converter import families


RELATIVE = {"relative_attention": True, "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"]}
# What T5 and its kin have beside what Pegasus has; a field that is None is left out.
_T5 = {
    **{"d_kv": 6, "d_ff": 24, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 1, "n_positions": 512},
    **{"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20},
    **dict.fromkeys(("max_position_embeddings", "init_std", "encoder_layers", "encoder_attention_heads", "dropout")),
}
# The recorded family whose configuration and tokenizer serve, the class that is saved, and what differs.
LIKE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert_generation": ("bert", "BertGenerationEncoder", {"type_vocab_size": 0}),
    "blenderbot": ("bart", "BlenderbotForConditionalGeneration", {}),
    "blenderbot_small": ("bart", "BlenderbotSmallForConditionalGeneration", {}),
    "data2vec_text": ("roberta", "Data2VecTextForMaskedLM", {}),
    "deberta": ("bert", "DebertaForMaskedLM", {**RELATIVE, "type_vocab_size": 0, "position_biased_input": False}),
    "deberta_v2": (
        "bert",
        "DebertaV2ForMaskedLM",
        {**RELATIVE, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    ),
    "ernie": ("bert", "ErnieForPreTraining", {"use_task_id": True}),
    "esm": (
        "roberta",
        "EsmForMaskedLM",
        {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4},
    ),
    "layoutlm": ("bert", "LayoutLMForMaskedLM", {}),
    "m2m_100": ("bart", "M2M100ForConditionalGeneration", {"scale_embedding": True}),
    "marian": ("pegasus", "MarianMTModel", {}),
    "markuplm": ("roberta", "MarkupLMForTokenClassification", {}),
    "megatron_bert": ("bert", "MegatronBertForPreTraining", {}),
    "mpnet": ("roberta", "MPNetForMaskedLM", {"relative_attention_num_buckets": 32}),
    "mt5": ("pegasus", "MT5ForConditionalGeneration", _T5),
    "plbart": ("bart", "PLBartForConditionalGeneration", {"scale_embedding": True}),
    "rembert": (
        "bert",
        "RemBertForMaskedLM",
        {
            "input_embedding_size": 12,
            "output_embedding_size": 20,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "tie_word_embeddings": False,
        },
    ),
    "roberta_prelayernorm": ("roberta", "RobertaPreLayerNormForMaskedLM", {}),
    "splinter": ("bert", "SplinterForQuestionAnswering", {"question_token_id": 4}),
    "t5": ("pegasus", "T5ForConditionalGeneration", _T5),
    "umt5": ("pegasus", "UMT5ForConditionalGeneration", _T5),
    "xlm_roberta_xl": ("roberta", "XLMRobertaXLForMaskedLM", {}),
    "xmod": ("roberta", "XmodForMaskedLM", {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"}),
}


def make_source(name: str, golden: Path, folder: Path, **others: Any) -> None:
    """Save the family's checkpoint to `folder`; `golden` has those of the recorded families, and `others` is what
    differs in its configuration."""
    like, architecture, changes = LIKE[name]
    content = json.loads((golden / like / "source" / "config.json").read_text())
    family = families.family(next(kind for kind in families.model_types() if kind.replace("-", "_") == name))
    config_class = families.stock_class(family.config_class)
    content = {**content, **changes, **others, "model_type": config_class.model_type, "architectures": [architecture]}
    content = {name: value for name, value in content.items() if value is not None}
    torch.manual_seed(0)
    model = families.stock_class(family.architectures[architecture])(config_class.from_dict(content))
    for parameter in model.parameters():
        if parameter.requires_grad:  # so that no bias is 0, and no scale 1
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.35)
    model.tie_weights()
    model.save_pretrained(folder)
    for path in (golden / like / "source").glob("*token*.json"):
        shutil.copy(path, folder)
