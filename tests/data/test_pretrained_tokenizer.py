"""Tokenizers of other projects keep every byte of a text, or are refused with the reason."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from posenc_jax.data import tokens
from posenc_jax.data.pretrained_tokenizer import BYTES, SPACE, PretrainedTokenizer
from posenc_jax.schema import ConfigError
from tests.data.settings import settings, write_books

ENGLISH = "It was the best of times, it was the worst of times; it was 1859 and 12 days.\n" * 20
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = "<|end|>"


def byte_level(**changes):
    """GPT-2's kind, with a special token, and with steps that would change a text."""
    model = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    model.normalizer = normalizers.NFC()
    options = {"initial_alphabet": ALPHABET, "special_tokens": [SPECIAL], "show_progress": False}
    model.train_from_iterator([ENGLISH], trainers.BpeTrainer(vocab_size=330, **options))
    model.enable_truncation(3)
    spec = json.loads(model.to_str())
    spec["added_tokens"][0]["lstrip"] = spec["added_tokens"][0]["rstrip"] = True
    return json.dumps(spec | changes)


def sentence_piece(**changes):
    """Llama 2's kind: spaces are U+2581, one is put before the text, and unknown characters are bytes."""
    single = [*BYTES, *sorted({SPACE, *ENGLISH.replace(" ", SPACE)})]
    pairs = [("t", "h"), (SPACE, "th"), ("th", "e"), (SPACE, "w"), (SPACE + "w", "a")]
    vocabulary = {piece: i for i, piece in enumerate([*single, *dict.fromkeys(map("".join, pairs))])}
    model = Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    model.add_special_tokens(["<s>"])
    return json.dumps(json.loads(model.to_str()) | changes)


def metaspace():
    """The newer form of the same kind."""
    step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": False}
    return sentence_piece(normalizer=None, pre_tokenizer=step)


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece, "metaspace": metaspace}
TEXTS = {
    "english": ENGLISH[:500],
    "empty": "",
    "spaces": "  leading, trailing and   many   ",
    "special": f"one {SPECIAL} two<s> {SPECIAL}",
    "not NFC": "e\u0301 \u1112\u1161\u11ab",
    "four-byte characters": "añ€😀\u200d한국어",
    "its own space": f"{SPACE}a{SPACE}{SPACE} b <0x41>",
    "line ends": "\r\n\n\r \t\n",
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return PretrainedTokenizer(KINDS[request.param](), 512)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_comes_back_and_the_bytes_of_its_tokens_sum_to_its_length(tokenizer, text):
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes.shape == (512,)


def test_bytes_that_are_no_text_come_back(tokenizer):
    text = bytes(range(256)) + "é".encode()[1:] + b" text " + "😀".encode()[:3]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_those_of_the_library_for_text_that_it_does_not_change():
    own = json.loads(byte_level()) | {"normalizer": None, "truncation": None}
    own["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = False
    text = ENGLISH[:200] + SPECIAL + "1859"
    expected = Tokenizer.from_str(json.dumps(own)).encode(text, add_special_tokens=False).ids
    assert PretrainedTokenizer(byte_level(), 512).encode(text.encode()).tolist() == expected
    pieces = Tokenizer.from_str(sentence_piece()).encode("the best", add_special_tokens=False).ids
    assert PretrainedTokenizer(sentence_piece(), 512).encode(b" the best").tolist() == pieces


def test_a_special_token_in_a_text_is_one_token():
    tokenizer = PretrainedTokenizer(byte_level(), 512)
    ids = tokenizer.encode(f" {SPECIAL} ".encode())
    assert [tokenizer.decode(ids[i : i + 1]) for i in range(3)] == [b" ", SPECIAL.encode(), b" "]


def bert():
    model = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return model.to_str()


def without_bytes():
    spec = json.loads(sentence_piece())
    spec["model"]["vocab"] = {piece: i for piece, i in spec["model"]["vocab"].items() if piece != "<0x0A>"}
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (lambda: "", "Expecting value"),
        (lambda: "{}", "it is not the JSON of a tokenizer"),
        (lambda: byte_level()[:-1], "delimiter"),
        (bert, "its model is WordPiece, which may lose text"),
        (lambda: byte_level(normalizer={"type": "Lowercase"}), "its normalizer Lowercase changes the text"),
        (lambda: byte_level(pre_tokenizer={"type": "Whitespace"}), "its pre-tokenizer Whitespace removes characters"),
        (lambda: byte_level(pre_tokenizer=None, normalizer=None), "no tokens of single bytes"),
        (without_bytes, "it has no token for the byte 0x0a"),
        (lambda: byte_level(model={"type": "BPE", "vocab": {"a": 600}, "merges": []}), "has 601 tokens, more than the"),
        (
            lambda: byte_level(added_tokens=[{"id": 700, "content": "x", "special": False}]),
            "'x' has id 700, beyond the 512 rows",
        ),
    ],
)
def test_a_tokenizer_that_loses_text_or_does_not_fit_is_refused(definition, reason):
    with pytest.raises(ConfigError, match=f"config.data.tokenizer = 'init_from': .*cannot be used: .*{reason}"):
        PretrainedTokenizer(definition(), 512)


def test_a_special_token_beyond_the_embedding_is_left_out_with_a_warning(caplog):
    spec = json.loads(byte_level())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 512, "content": "<image>"})
    text = b"an <image> of it"
    tokenizer = PretrainedTokenizer(json.dumps(spec), 512)
    assert "'<image>' has no embedding" in caplog.text
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text)


def test_a_text_with_a_byte_that_has_no_token_is_refused():
    spec = json.loads(byte_level())
    spec["model"]["vocab"]["unused"] = spec["model"]["vocab"].pop(ALPHABET[-1])
    tokenizer = PretrainedTokenizer(json.dumps(spec), 512)
    assert tokenizer.decode(tokenizer.encode(b"fine")) == b"fine"
    lost = [byte for byte in range(256) if byte in tokenizer._missing]
    assert len(lost) == 1
    with pytest.raises(ConfigError, match=f"has no token for the byte {lost[0]:#04x} in "):
        tokenizer.encode(b"a" + bytes(lost))


def test_tokens_are_cached_by_the_definition(tmp_path):
    books = write_books(tmp_path, 3)
    config = settings(tmp_path, path=str(books), tokenizer="init_from", vocab_size=512, test_fraction=1.0)
    found = [tokens.prepare(config, definition()) for definition in (byte_level, sentence_piece, byte_level)]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint
    for dataset in found:
        test = dataset.splits["test"]
        assert dataset.tokenizer.token_bytes[test.tokens].sum() == test.num_bytes > 0
        assert [len(dataset.splits[name].tokens) for name in ("train", "validation")] == [0, 0]
    with pytest.raises(ConfigError, match=r"config.data.tokenizer = 'init_from': needs a model in config.init_from"):
        tokens.prepare(config)


def test_all_text_as_test_text_leaves_no_patterns(tmp_path):
    books = write_books(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"config.data.test_files = .*must be \(\) for config.data.test_fraction = 1"):
        tokens.prepare(settings(tmp_path, path=str(books), test_fraction=1.0, test_files=("*1.txt",)))
