"""The files of Hugging Face give the ids of our tokenizers, and the text back."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Model

from posenc_jax.data import tokenizers
from posenc_jax.data.pretrained_tokenizer import PretrainedTokenizer
from posenc_jax.data.tokenizer_json import tokenizer_json
from tests.small import run_config

ROOT = Path(__file__).parent.parent.parent
TEXT = "Hello  world! def f(x):\n\treturn x**2 # 123 나는 사과를 🍎\r\n the ##a \N{FULLWIDTH NUMBER SIGN}" * 3
KINDS = [("bytes", 256), ("bpe", 400), ("wordpiece", 600), ("wordpiece", 50_000)]  # the last one is not filled


def trained(kind: str, size: int) -> tokenizers.Tokenizer:
    config = run_config(data__tokenizer=kind, data__vocab_size=size).data
    return tokenizers.train(config, [(ROOT / "posenc_jax" / "schema.py").read_bytes()[:6000]])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_ids_and_text_are_the_same(kind, size, mask):
    tokenizer = trained(kind, size)
    definition, config = tokenizer_json(tokenizer, mask=mask)
    model = Model.from_str(definition)
    ids = tokenizer.encode(TEXT.encode()).tolist()
    assert model.encode(TEXT).ids == ids
    assert model.decode(ids) == TEXT
    assert config.get("mask_token") == ("[MASK]" if mask else None)
    if mask:
        assert model.encode("a [MASK]").ids[-1] == size


@pytest.mark.torch
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_transformers_reads_the_same_ids(kind, size, mask, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind, size)
    definition, config = tokenizer_json(tokenizer, mask=mask)
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = found(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT.encode()).tolist()
    assert found.decode(ids) == TEXT
    assert found.mask_token_id == (size if mask else None)


def test_a_pretrained_tokenizer_is_written_as_it_came():
    definition, _ = tokenizer_json(trained("bpe", 300))
    again = PretrainedTokenizer(definition, 300)
    assert tokenizer_json(again)[0] == definition
    masked, _ = tokenizer_json(again, mask=True)
    assert Model.from_str(masked).token_to_id("[MASK]") == 300
