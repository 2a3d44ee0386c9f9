"""Hugging Face folders: what is read of them, and what is refused and why."""

import json
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from posenc_jax.interop.pretrained import open_pretrained
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import DamagedError
from tests.interop.foreign import loaded

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens": (61, 16),
    "model.norm": (16,),
    **{f"{LAYER}.self_attn.{name}_proj": (16, 16) for name in "qkvo"},
    **{f"{LAYER}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")},
    f"{LAYER}.mlp.down_proj": (16, 24),
    **{f"{LAYER}.{name}_layernorm": (16,) for name in ("input", "post_attention")},
}


def random_weights():
    draw = np.random.default_rng(0)
    return {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(folder, config=None, weights=None, name="model.safetensors"):
    """A folder with a small Llama. Returns its path as text."""
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(random_weights() if weights is None else weights, folder / name)
    return str(folder)


def error_of(folder, *arguments, **options):
    """The text of the error for a folder that `write` has written."""
    with pytest.raises(ConfigError) as caught:
        loaded(write(folder, *arguments, **options))
    return str(caught.value)


def test_what_a_folder_says_of_its_model(tmp_path):
    found = open_pretrained(write(tmp_path, CONFIG | {"num_key_value_heads": 2, "rope_theta": 500.0}))
    assert (found.path, found.pretrained_length, found.vocab_size) == (tmp_path, 32, 61)
    assert found.encoding["name"] == "rope"
    assert found.encoding["base"] == 500
    assert found.model["d_ff"] == 24
    assert not found.model.keys() & {"dropout", "dtype", "remat"}
    with pytest.raises(ConfigError, match=r"must have a tokenizer.json"):
        _ = found.tokenizer
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    assert found.tokenizer == '{"version": "1.0"}'
    changed = random_weights() | {"model.norm.weight": np.zeros(16, np.float32)}
    save_file(changed, tmp_path / "model.safetensors")
    assert open_pretrained(str(tmp_path)).sha256 != found.sha256


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_narrow_numbers_are_read_and_kept(tmp_path, dtype):
    weights = {name: array.astype(dtype) for name, array in random_weights().items()}
    found, model = loaded(write(tmp_path, weights=weights))
    np.testing.assert_array_equal(model.norm.scale[...], weights["model.norm.weight"].astype(np.float32))
    kept = found.params({"norm": {"scale": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}} | abstract_without_norm(model))
    assert kept["norm"]["scale"].dtype == jnp.bfloat16
    assert kept["embedding"].dtype == jnp.float32


def abstract_without_norm(model):
    from flax import nnx

    params = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])
    return {name: value for name, value in params.items() if name != "norm"}


def test_parameters_are_placed_where_they_are_asked_for(tmp_path):
    found, model = loaded(write(tmp_path))
    from flax import nnx

    params = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = found.params(params, {"embedding": split})
    assert placed["embedding"].sharding == split
    np.testing.assert_array_equal(placed["embedding"], params["embedding"])


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path):
    weights = random_weights()
    open_pretrained(write(tmp_path, weights=weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}))
    other = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    assert "'lm_head.weight', which is not equal to 'model.embed_tokens.weight'" in error_of(tmp_path, weights=other)


def test_the_prefix_of_names_may_be_absent(tmp_path):
    weights = {name.removeprefix("model."): array for name, array in random_weights().items()}
    _, model = loaded(write(tmp_path, weights=weights))
    np.testing.assert_array_equal(model.embedding[...], weights["embed_tokens.weight"])


def test_errors_name_the_tensor(tmp_path):
    weights, gone = random_weights(), f"{LAYER}.mlp.up_proj.weight"
    left = {name: array for name, array in weights.items() if name != gone}
    assert f"lacks tensor '{gone}'" in error_of(tmp_path, weights=left)
    renamed = left | {f"{LAYER}.mlp.upper_proj.weight": weights[gone]}
    assert f"lacks tensor '{gone}'" in error_of(tmp_path, weights=renamed)
    assert "has tensor 'extra', which its architecture does not use" in error_of(
        tmp_path, weights=weights | {"extra": weights[gone]}
    )
    bias = weights | {f"{LAYER}.mlp.up_proj.bias": np.zeros(24, np.float32)}
    assert f"has tensor '{LAYER}.mlp.up_proj.bias'" in error_of(tmp_path, weights=bias)
    for shape in ((24, 15), (16, 24), (384,), ()):
        wrong = weights | {gone: np.zeros(shape, np.float32)}
        assert f"tensor '{gone}' has shape {shape}, not (24, 16)" in error_of(tmp_path, weights=wrong)
    assert "tensor 'model.embed_tokens.weight' has shape (61, 16), not (64, 16)" in error_of(
        tmp_path, CONFIG | {"vocab_size": 64}
    )
    integers = weights | {gone: np.zeros((24, 16), np.int32)}
    assert f"tensor '{gone}' has dtype I32; must be one of: F64, F32, F16, BF16" in error_of(tmp_path, weights=integers)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model_type": "lama"}, "model_type = 'lama': must be one of: bert, bloom"),
        ({"model_type": "lama"}, "Did you mean 'llama'?"),
        ({"model_type": None}, "model_type = None: must be one of"),
        ({"model_type": ["llama"]}, "model_type = ['llama']: must be one of"),
        ({"model_type": "gemma3", "text_config": {}}, "is a model of text with images or sound; only models of text"),
        ({"hidden_size": None}, "hidden_size = None: is missing"),
        ({"hidden_size": "16"}, "hidden_size = '16': must be int"),
        ({"hidden_size": True}, "hidden_size = True: must be int"),
        ({"hidden_size": -16}, "hidden_size = -16: must be an integer from 1 to 16777216"),
        ({"hidden_size": 2**40}, "must be an integer from 1 to 16777216"),
        ({"hidden_size": 17}, "num_attention_heads = 2: must divide hidden_size = 17"),
        ({"num_hidden_layers": 10**6}, "model.num_layers = 1000000"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads = 3: must divide the number of heads",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be one of: silu"),
        ({"rms_norm_eps": -1.0}, "norm_eps = -1.0: must be above 0"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2}}, "Did you mean 'yarn'?"),
        ({"rope_scaling": [1]}, "rope_scaling = [1]: must be dict"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: is not known for this architecture"),
        ({"head_dimm": 8}, "the nearest known field is 'head_dim'"),
        ({"sliding_window": 8}, "sliding_window = 8: is not known for this architecture"),
    ],
)
def test_errors_name_the_field_of_config_json(tmp_path, fields, error):
    assert error in error_of(tmp_path, CONFIG | fields)


QWEN = CONFIG | {"model_type": "qwen2", "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (QWEN | {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window = False: must be true, as layer_types"),
        (QWEN | {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        (QWEN | {"layer_types": [["full_attention"], {}]}, "must be full_attention or sliding_attention"),
        (
            QWEN | {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1]},
            "use_sliding_window = True: must be false, as layers without RoPE would have a window",
        ),
        (QWEN | {"model_type": "smollm3", "no_rope_layers": [2, 0]}, "no_rope_layers = [2, 0]: must be 0 or 1"),
        (
            {"model_type": "mpt", "d_model": 8, "n_heads": 2, "n_layers": 1, "attn_config": {"clip_qkv": 6}},
            "attn_config: clip_qkv = 6: must be None",
        ),
        ({"model_type": "gpt2", "n_embd": 8, "scale_attn_by_inverse_layer_idx": True}, "must be False"),
        ({"model_type": "gpt2", "n_embd": 8, "hidden_size": 9}, "hidden_size = 9: must be 8, as n_embd is"),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "must be False"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder = True: must be False"),
        ({"model_type": "gemma2", "num_hidden_layers": 1, "use_bidirectional_attention": True}, "is missing"),
    ],
)
def test_settings_without_counterpart_are_refused(tmp_path, config, error):
    assert error in error_of(tmp_path, config)


def shard(folder, listed, *files):
    """Writes an index, and files of weights by their names."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    for name, weights in files:
        save_file(weights, folder / name)
    return str(folder)


def test_an_index_says_which_files_are_read(tmp_path):
    write(tmp_path)
    weights = random_weights()
    names = sorted(weights)
    first, second = ({name: weights[name] for name in part} for part in (names[:5], names[5:]))
    listed = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    files = ("a.safetensors", first), ("b.safetensors", second)
    source = shard(tmp_path, listed, *files, ("other.safetensors", weights))
    assert [path.name for path in open_pretrained(source)._files.weights] == ["a.safetensors", "b.safetensors"]
    for changed, more, error in (
        (listed | {"extra": "a.safetensors"}, (), "lacks tensor 'extra', which model.safetensors.index.json lists"),
        (listed, (("b.safetensors", weights),), f"has tensor '{names[0]}' in two files: a.safetensors, b.safetensors"),
        (listed | {"extra": "c.safetensors"}, (), "must have its weights in c.safetensors"),
        (listed | {"extra": "../a.safetensors"}, (), "must be a *.safetensors beside it"),
        (listed | {"extra": 3}, (), "must have a weight_map of file names"),
        ([], (), "must have a weight_map of file names"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_pretrained(shard(tmp_path, changed, *files, *more))
        assert error in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "pytorch_model.bin")  # opening it would wait for a writer
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin is a pickle, which can run any code, so it is never opene"
    ):
        open_pretrained(str(tmp_path))


def test_a_path_that_is_none_of_a_models(tmp_path):
    with pytest.raises(ConfigError, match=r"config.init_from = '.*nothing': must be a workdir, .* and does not exist"):
        open_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"must be a folder with a config.json"):
        open_pretrained(str(tmp_path))
    for name in ("config.json", "model.safetensors", "model.gguf"):
        write(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(ConfigError):
            open_pretrained(str(tmp_path / name if name == "model.gguf" else tmp_path))
        (tmp_path / name).unlink()


BROKEN = [b"", b"\0\xff\xfe", b"[1, 2]", b"3", b'{"a": ', b"[" * 10**5, b'{"a":' * 50, b'{"a": 1e', b"\xff" * 99]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: str(content[:6]))
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((ConfigError, DamagedError), match=str(tmp_path)):
        open_pretrained(str(tmp_path))


def test_weights_that_are_cut_anywhere_are_refused(tmp_path):
    source = write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for cut in [*range(0, len(content), 211), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
            open_pretrained(source)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    source = write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for size in (length + 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
            open_pretrained(source)
    for own in (
        {"shape": [2**40]},
        {"shape": [2**63, 2]},
        {"data_offsets": [0, 2**60]},
        {"dtype": "F99"},
        {"shape": [-1]},
    ):
        changed = json.dumps(header | {"model.norm.weight": header["model.norm.weight"] | own}).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
        with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
            open_pretrained(source)


MEMORY = """
import sys, jax, numpy as np
from posenc_jax.interop.pretrained import open_pretrained

def status(name):
    text = open("/proc/self/status").read()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024

found = open_pretrained(sys.argv[1])
shapes, abstract = found._files.shapes(), {}
for tensor in found._tensors:
    arrays = tensor.unpack(*(np.broadcast_to(np.float32(0), shapes[name]) for name in tensor.names))
    for param, array in zip(tensor.params, arrays):
        *path, last = param.split("/")
        section = abstract
        for name in path:
            section = section.setdefault(name, {})
        section[last] = jax.ShapeDtypeStruct(array.shape, np.float32)
size = sum(4 * x.size for x in jax.tree.leaves(abstract))
jax.block_until_ready(jax.device_put(np.zeros(4, np.float32)))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
params = found.params(abstract)
print(size, status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of peak memory")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_peak_memory_is_little_above_the_parameters(tmp_path, dtype):
    config = CONFIG | {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
    weights = {}
    for name, shape in SHAPES.items():
        own = tuple({61: 8192, 16: 1024, 24: 2048}[n] for n in shape)
        for i in range(2 if ".layers." in name else 1):
            weights[f"{name}.weight".replace(".0.", f".{i}.")] = np.full(own, 0.5, dtype)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX_COMP"))}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, check=True, env=environment
    )
    size, peak = map(int, ran.stdout.split())
    assert size > 100e6
    assert peak < 1.3 * size
