"""The encoder of a family that has a decoder too, such as T5's, in sentence-transformers.

By itself sentence-transformers takes the stock class for such an encoder. A copy of this file lies beside the weights
of a model for sentences, and `modules.json` names its class.
"""

from typing import Any

from sentence_transformers.base.modules import Transformer
from transformers import AutoModelForTextEncoding


class LSGTransformer(Transformer):
    """As its base, with the code that lies beside the weights."""

    def _load_encoder_only_model(self, model_name_or_path: str, config: Any, **model_kwargs: Any) -> Any:
        return AutoModelForTextEncoding.from_pretrained(model_name_or_path, config=config, **model_kwargs)
