"""GGUF files give the logits of transformers, in each kind of numbers, and damaged ones are refused."""

import re
import struct

import gguf
import numpy as np
import pytest

from posenc_jax.interop.gguf_file import TENSORS
from posenc_jax.interop.gguf_header import read_header
from posenc_jax.interop.pretrained import open_pretrained
from posenc_jax.schema import ConfigError
from tests.interop.foreign import loaded, logits_and_loss, random_model, tokens

F32, F16, Q8, Q4 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "Q8_0", "Q4_1"))
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {theirs: own for own, theirs in TENSORS.items()}
LETTERS = [*(chr(x) for x in range(65, 65 + 60)), "AB"]
META = {
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
}


def write(path, kind, weights, number=F32, meta=(), tokenizer="gpt2", factors=None, end=None):
    """Write a file of an architecture with weights by Hugging Face's names. Returns the weights as they are stored."""
    writer, stored = gguf.GGUFWriter(path, kind), {}
    for name, value in (META | dict(meta)).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{kind}.{name}", value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("gpt-2")
    letters = [*LETTERS, *(f"<{i}>" for i in range(61, len(weights["model.embed_tokens.weight"])))]
    writer.add_token_list(letters)
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges(["A B"])
    if end is not None:
        writer.add_eos_token_id(end)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    for name, array in weights.items():
        own = array
        if kind == "llama" and re.search("[qk]_proj", name):  # llama.cpp rotates pairs of neighbouring rows
            own = array.reshape(-1, 2, 8, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        used = F32 if array.ndim == 1 else number
        data = gguf.quantize(np.ascontiguousarray(own), used)
        layer = re.search(r"layers\.(\d+)\.", name)
        short = NAMES[re.sub(r"layers\.\d+\.", "layers.*.", name)].replace("*", layer[1] if layer else "*")
        writer.add_tensor(short, data, raw_dtype=used)
        stored[name] = gguf.dequantize(gguf.quantize(array, used), used).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def random_weights(vocab_size=61):
    """The weights of a Llama, by Hugging Face's names."""
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (vocab_size, 64), "model.norm": (64,)}
    for i in range(2):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes |= {f"{attention}.{name}_proj": (64, 64) for name in "qo"}
        shapes |= {f"{attention}.{name}_proj": (32, 64) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (96, 64) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (64, 96)}
        shapes |= {f"{layer}.{name}_layernorm": (64,) for name in ("input", "post_attention")}
    return {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def weights():
    return random_weights()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "number", "fields"),
    [
        ("llama", Q8, {"attention_bias": True}),
        ("llama", F16, {"tie_word_embeddings": True}),
        ("llama", F32, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "mlp_bias": True}),
        ("qwen2", Q4, {}),
        ("qwen3", F16, {"head_dim": 16}),
    ],
)
def test_logits_equal_those_of_transformers(tmp_path, kind, number, fields):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = random_model(kind, **FIELDS | fields)
    weights = {name: array.numpy() for name, array in theirs.state_dict().items()}
    if fields.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    meta = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0} if "rope_scaling" in fields else {}
    stored = write(tmp_path / "model.gguf", kind, weights, number, meta)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in stored.items()}, strict=False)
    text = tokens(61, 40)
    with torch.no_grad():
        expected = theirs(torch.tensor(text, dtype=torch.long)).logits.numpy()
    _, model = loaded(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits_and_loss(model, text, text)[0], expected, atol=1e-4)


def test_the_factors_of_llama_3_1_divide_the_rates_of_the_pairs(tmp_path, weights):
    factors = [1, 1, 1.5, 2, 4, 8, 8, 8]
    write(tmp_path / "model.gguf", "llama", weights, factors=factors)
    _, model = loaded(tmp_path / "model.gguf")
    rates = 5000.0 ** (-np.arange(0, 16, 2) / 16) / factors
    np.testing.assert_allclose(model.encoding().inverse_frequencies[...], rates, rtol=1e-6)
    assert model.encoding().attention_factor[...] == 1
    write(tmp_path / "both.gguf", "llama", weights, factors=factors, meta={"rope.scaling.type": "yarn"})
    with pytest.raises(ConfigError, match=r"both tensor 'rope_freqs.weight' and rope.scaling.type = 'yarn'"):
        open_pretrained(str(tmp_path / "both.gguf"))


@pytest.mark.parametrize(
    ("kind", "meta", "error"),
    [
        ("qwen35", {}, r"general.architecture = 'qwen35': must be one of: llama, qwen2, qwen3. Did you mean 'qwen"),
        ("llama", {"expert_count": 8}, "llama.expert_count = 8: is not known, and may change the output"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count = 8: must be 16, the width of a head"),
        ("llama", {"rope.scaling.type": "stretch"}, "rope_type = 'stretch': must be one of: default, linear"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 2.0}, "attn_factor = 2.0"),
        ("llama", {"embedding_length": 32}, "has shape"),
    ],
)
def test_settings_without_counterpart_are_refused(tmp_path, weights, kind, meta, error):
    write(tmp_path / "model.gguf", kind, weights, meta=meta)
    with pytest.raises(ConfigError, match=error):
        loaded(tmp_path / "model.gguf")


def test_other_tokenizers_are_refused_when_they_are_asked_for(tmp_path, weights):
    write(tmp_path / "model.gguf", "llama", weights, tokenizer="llama")
    found = open_pretrained(str(tmp_path / "model.gguf"))
    with pytest.raises(ConfigError, match=r"tokenizer.ggml.model = 'llama': must be 'gpt2', byte-level BPE"):
        _ = found.tokenizer


def test_numbers_that_cannot_be_dequantized_are_refused(tmp_path, weights):
    write(tmp_path / "model.gguf", "llama", weights, Q8)
    content = (tmp_path / "model.gguf").read_bytes()
    at = content.index(b"blk.0.attn_v.weight") + 19 + 4 + 16  # after name, number of axes and axes
    assert struct.unpack_from("<I", content, at) == (Q8.value,)
    for kind, error in ((gguf.GGMLQuantizationType.Q8_1.value, "blk.0.attn_v.weight"), (99, "99 is not a valid")):
        (tmp_path / "model.gguf").write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        with pytest.raises(ConfigError, match=error):
            loaded(tmp_path / "model.gguf")


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, weights):
    path = tmp_path / "model.gguf"
    write(path, "llama", weights, Q8)
    content, tensors = path.read_bytes(), read_header(path).tensors
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    end = last.offset + np.prod(last.shape[:-1], dtype=int) * last.row_bytes
    first = min(tensor.offset for tensor in tensors.values())
    for cut in [*range(0, first, 37), *range(first, end, 5001), end - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(ConfigError, match="is not a GGUF file, or is damaged"):
            open_pretrained(str(path))


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["tensors", "entries", "name", "list", "text", "axis", "offset"])
def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path, weights, what, value):
    path = tmp_path / "model.gguf"
    write(path, "llama", weights)
    content = bytearray(path.read_bytes())
    tensor = content.index(b"blk.0.attn_v.weight") + 19 + 4
    listed = content.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4
    at = {"tensors": 8, "entries": 16, "name": 24, "list": listed, "text": listed + 8}
    at |= {"axis": tensor, "offset": tensor + 16 + 4}
    struct.pack_into("<Q", content, at[what], value)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a GGUF file, or is damaged"):
        open_pretrained(str(path))


def test_metadata_of_every_kind_is_read_as_the_library_reads_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in (("uint8", 7), ("int8", -7), ("uint16", 300), ("int16", -300), ("int32", -70000)):
        getattr(writer, f"add_{name}")(name, value)
    for name, value in (("uint64", 2**60), ("int64", -(2**60)), ("float64", 0.1), ("bool", True), ("string", "é")):
        getattr(writer, f"add_{name}")(name, value)
    writer.add_float32("float32", 1e-5)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "", "한"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(tmp_path / "model.gguf").metadata
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
    expected = {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}
    assert found.pop("float32") == 1e-5  # in its shortest form
    assert np.float32(expected.pop("float32")) == np.float32(1e-5)
    assert found == expected
