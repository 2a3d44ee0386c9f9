"""The tokenizers of this project as the files tokenizer.json and tokenizer_config.json of Hugging Face."""

import json
from typing import Any

from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, pre_tokenizers

from posenc_jax.data.pretrained_tokenizer import PretrainedTokenizer
from posenc_jax.data.tokenizers import INSIDE, ByteTokenizer, Tokenizer, byte_characters

MASK = "[MASK]"


def tokenizer_json(tokenizer: Tokenizer, *, mask: bool = False) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json, and the fields of tokenizer_config.json.

    The tokenizer of a pretrained model is returned as it came. The others give a UTF-8 text of up to 2^20 characters
    the ids of `tokenizer.encode`. With `mask`, the token with the id `vocab_size` is "[MASK]": the mask token of an
    encoder.
    """
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, PretrainedTokenizer) and not mask:
        return tokenizer.definition, config
    model = _bytes_model() if isinstance(tokenizer, ByteTokenizer) else Model.from_str(tokenizer.definition)
    if not isinstance(tokenizer, PretrainedTokenizer):
        model.decoder = decoders.Sequence([decoders.Replace(INSIDE, ""), decoders.ByteLevel()])
    if not mask:
        return model.to_str(pretty=True), config
    spec, size = json.loads(model.to_str()), tokenizer.vocab_size
    # The library gives a new token the next id, so the ids that no token has get one that never occurs.
    spec["model"]["vocab"] |= {f"[unused{i}]": i for i in range(model.get_vocab_size(), size)}
    model = Model.from_str(json.dumps(spec))
    model.add_special_tokens([MASK])
    return model.to_str(pretty=True), config | {"mask_token": MASK}


def _bytes_model() -> Model:
    """Byte-level BPE without merges, so that every token is a byte."""
    model = Model(models.BPE({character: byte for byte, character in enumerate(byte_characters())}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return model
