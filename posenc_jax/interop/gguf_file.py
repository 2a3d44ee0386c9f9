"""GGUF files, as llama.cpp reads them: settings, tokenizer and quantized weights in one file.

Settings and tensor names are translated to those of the family's Hugging Face folders, see `families`.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from posenc_jax.errors import one_line
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.gguf_header import Stored, read_header
from posenc_jax.schema import ConfigError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# The settings of an architecture, without its prefix, and the fields of config.json that they are.
SETTINGS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
HEAD_WIDTHS = frozenset({"attention.value_length", "rope.dimension_count"})  # must be head_dim
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's rule as one factor per pair
MAX_ROPE_FACTORS = 1 << 16
CHUNK = 1 << 22  # numbers that are dequantized at a time

# Their tensor names, in which * is the layer, and those of Hugging Face.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "blk.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blk.*.attn_q.weight": "model.layers.*.self_attn.q_proj.weight",
    "blk.*.attn_k.weight": "model.layers.*.self_attn.k_proj.weight",
    "blk.*.attn_v.weight": "model.layers.*.self_attn.v_proj.weight",
    "blk.*.attn_q.bias": "model.layers.*.self_attn.q_proj.bias",
    "blk.*.attn_k.bias": "model.layers.*.self_attn.k_proj.bias",
    "blk.*.attn_v.bias": "model.layers.*.self_attn.v_proj.bias",
    "blk.*.attn_output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blk.*.attn_output.bias": "model.layers.*.self_attn.o_proj.bias",
    "blk.*.attn_q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "blk.*.attn_k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "blk.*.ffn_gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blk.*.ffn_up.weight": "model.layers.*.mlp.up_proj.weight",
    "blk.*.ffn_down.weight": "model.layers.*.mlp.down_proj.weight",
    "blk.*.ffn_gate.bias": "model.layers.*.mlp.gate_proj.bias",
    "blk.*.ffn_up.bias": "model.layers.*.mlp.up_proj.bias",
    "blk.*.ffn_down.bias": "model.layers.*.mlp.down_proj.bias",
}

# How a tokenizer cuts text into words, by its name in the file: regular expressions, applied one after the other.
WORDS = {
    "smollm": None,
    "gpt-2": None,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}

WHOLE_WORDS = ("llama-bpe",)  # tokenizers for which a word that is a token is never divided
CONTROL, ADDED = 3, 4  # kinds of tokens that stand in a text as they are


class GGUFFile:
    """A file whose tensors are read, and dequantized, one at a time. Raises ConfigError if it is damaged or unknown.

    Attributes:
      config: the settings as the fields of a config.json.
    """

    def __init__(self, path: Path):
        self.path, self.weights = path, [path]
        if not path.is_file():
            raise self._error("must be a regular file")
        try:
            self._metadata, tensors = read_header(path)
        except (ValueError, OSError) as error:
            raise self._error(f"is not a GGUF file, or is damaged: {one_line(error)}") from None
        self._tensors = {_hf_name(name): (name, stored) for name, stored in tensors.items()}
        self.config = self._translated()

    def tokenizer(self) -> str:
        """The JSON of the tokenizer, for the library `tokenizers`."""
        return _tokenizer(Fields(self._metadata, str(self.path)))

    def end_tokens(self) -> frozenset[int]:
        """The token that ends a text, if the file names one."""
        token = Fields(self._metadata, str(self.path)).take("tokenizer.ggml.eos_token_id", int, None)
        return frozenset() if token is None else frozenset({token})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: stored.shape for name, (_, stored) in self._tensors.items() if name != ROPE_FACTORS}

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32."""
        array = self._dequantized(*self._tensors[name])
        if self.config["model_type"] == "llama" and re.search(r"[qk]_proj\.(weight|bias)$", name):
            # llama.cpp rotates pairs of neighbouring rows (2m, 2m + 1), and Hugging Face rows m and m + d/2.
            pairs = array.reshape(-1, self.config["head_dim"] // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    def _dequantized(self, name: str, stored: Stored) -> np.ndarray:
        """A tensor in float32. Some rows are dequantized at a time, as this takes several times their memory."""
        rows, width = math.prod(stored.shape[:-1]), stored.shape[-1] if stored.shape else 1
        array, step = np.empty((rows, width), np.float32), max(1, CHUNK // max(width, 1))
        with open(self.path, "rb") as file:
            file.seek(stored.offset)
            for first in range(0, rows, step):
                part = array[first : first + step]
                data = np.frombuffer(file.read(len(part) * stored.row_bytes), np.uint8)
                try:
                    part[:] = gguf.dequantize(data.reshape(len(part), stored.row_bytes), stored.kind)
                except (NotImplementedError, ValueError) as error:
                    kind = stored.kind.name
                    raise self._error(f"tensor {name!r} of type {kind} cannot be read: {one_line(error)}") from None
        return array.reshape(stored.shape)

    def _translated(self) -> dict[str, Any]:
        fields = Fields(self._metadata, str(self.path))
        kind = fields.take("general.architecture", str)
        if kind not in ARCHITECTURES:
            raise fields.error(
                "general.architecture", kind, f"must be one of: {', '.join(ARCHITECTURES)}", ARCHITECTURES
            )
        own = {name.removeprefix(f"{kind}."): x for name, x in self._metadata.items() if name.startswith(f"{kind}.")}
        config = {"model_type": kind, "tie_word_embeddings": "lm_head.weight" not in self._tensors}
        for name, value in own.items():
            if name in SETTINGS:
                config[SETTINGS[name]] = value
            elif name not in HEAD_WIDTHS and not name.startswith("rope.scaling."):
                raise fields.error(f"{kind}.{name}", value, "is not known, and may change the output")
        if kind != "qwen2":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        if kind == "llama":
            config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._tensors
        heads, width = (fields.count(f"{kind}.{name}") for name in ("attention.head_count", "embedding_length"))
        config.setdefault("head_dim", width // heads)
        for name in HEAD_WIDTHS & own.keys():
            if own[name] != config["head_dim"]:
                raise fields.error(f"{kind}.{name}", own[name], f"must be {config['head_dim']}, the width of a head")
        config.setdefault("vocab_size", len(fields.take("tokenizer.ggml.tokens", list, [])))
        if scaling := _rope_scaling(own):
            config["rope_scaling"] = scaling
        if ROPE_FACTORS in self._tensors:
            if scaling:
                raise self._error(
                    f"has both tensor {ROPE_FACTORS!r} and rope.scaling.type = {own['rope.scaling.type']!r}"
                )
            config["rope_scaling"] = self._rope_factors()
        return config

    def _rope_factors(self) -> dict[str, Any]:
        """The rule that divides the rate of each pair by a factor of its own: LongRoPE's, at one factor of 1."""
        name, stored = self._tensors[ROPE_FACTORS]
        if len(stored.shape) != 1 or stored.shape[0] > MAX_ROPE_FACTORS:
            raise self._error(f"tensor {name!r} has shape {stored.shape}, not one factor per pair")
        factors = [float(str(factor)) for factor in self._dequantized(name, stored)]
        return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}

    def _error(self, allowed: str) -> ConfigError:
        return ConfigError("config.init_from", str(self.path), allowed)


def _rope_scaling(own: dict[str, Any]) -> dict[str, Any]:
    """The section rope_scaling of a config.json for the settings of a file; empty for none."""
    names = {"type": "rope_type", "original_context_length": "original_max_position_embeddings"}
    given = {name.removeprefix("rope.scaling."): x for name, x in own.items() if name.startswith("rope.scaling.")}
    if given.get("type", "none") == "none":
        return {}
    return {names.get(name, name): value for name, value in given.items() if name != "finetuned"}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown name is returned unchanged."""
    layer = re.match(r"blk\.(\d+)\.", name)
    pattern = re.sub(r"^blk\.\d+\.", "blk.*.", name)
    return TENSORS.get(pattern, name).replace("*", layer[1] if layer else "*")


def _tokenizer(fields: Fields) -> str:
    """A byte-level BPE tokenizer from the metadata. Raises ConfigError for tokenizers of other kinds."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    prefix = "tokenizer.ggml."
    model = fields.take(f"{prefix}model", str)
    if model != "gpt2":
        allowed = "must be 'gpt2', byte-level BPE; take the model's Hugging Face folder, which has tokenizer.json"
        raise fields.error(f"{prefix}model", model, allowed)
    words = fields.take(f"{prefix}pre", str)
    if words not in WORDS:
        raise fields.error(f"{prefix}pre", words, "must be one of: " + ", ".join(WORDS), WORDS)
    tokens, kinds = fields.take(f"{prefix}tokens", list), fields.take(f"{prefix}token_type", list)
    merges = fields.take(f"{prefix}merges", list)
    try:
        ids = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(pair.split(" ", 1)) for pair in merges]
        tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=words in WHOLE_WORDS))
        special = [
            AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL
        ]
        added = [
            AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == ADDED
        ]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises errors of many kinds; its panics are not Exceptions
        raise ConfigError(
            f"{fields.path}: {prefix}merges", "...", f"does not fit the tokens: {one_line(error)}"
        ) from None
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    pattern = WORDS[words]
    if pattern:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)] * (words == "smollm") + [byte_level(use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return json.dumps(json.loads(tokenizer.to_str()))
