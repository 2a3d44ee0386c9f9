"""Changes of settings that do not change the output of a model, for families that need other settings.

`CONVERSIONS` lists these settings. A conversion also changes the parameters, which are arrays by path, such as
"block_0/attention/q/kernel".
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from posenc_jax import encodings
from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Dims
from posenc_jax.interop.family import Architecture
from posenc_jax.schema import flat, plain

FREE = ("dropout", "dtype", "remat")  # fields of config.model that do not change what a model computes
Params = dict[str, Any]  # arrays by path
Settings = dict[str, Any]  # by name, such as "model.norm" and "encoding.base"
INITIAL = {"learned": {"stddev": 1.0}}  # settings of encodings that matter only before training
OF_RATES = ("encoding.base", "encoding.fraction", "encoding.scaling", "training.pretrained_length")
MASK_BIAS = -1e9  # of the mask token, which an encoder does not predict


def complete(architecture: Architecture) -> Architecture:
    """The architecture with all settings, and with one letter per layer in its pattern.

    Settings that have no effect beside the others get one value, so that settings of equal models are equal.
    """
    model = {name: x for name, x in plain(TransformerConfig(**architecture.model)).items() if name not in FREE}
    encoding: dict[str, Any] = EncodingConfig.parse(architecture.encoding, "config.encoding").plain()
    encoding |= INITIAL.get(encoding["name"], {})
    letters = "".join(itertools.islice(itertools.cycle(model["pattern"]), model["num_layers"]))
    if not model["window"] or "E" not in letters:
        model["window"], letters = 0, letters.replace("G", "E")
    if encoding["name"] == "none":
        letters = letters.replace("N", "G") if model["window"] else "E" * len(letters)
    elif set(letters) == {"N"}:
        encoding, letters = {"name": "none"}, "E" * len(letters)
    if encoding["name"] in ("p_rope", "hope"):
        encoding = _proportional(encoding, model["head_dim"], architecture.pretrained_length)
    unscaled = encoding.get("scaling") == "none" and encoding["window_base"] == encoding["base"]
    if encoding["name"] == "rope" and (unscaled or not model["window"]):
        encoding["window_base"] = 0.0
    model["pattern"] = letters
    model["qkv_bias"] = model["qkv_bias"] and not model["use_bias"]  # which has these biases too
    return architecture._replace(model=model, encoding=encoding)


def _proportional(encoding: dict[str, Any], head_dim: int, length: int) -> dict[str, Any]:
    """p-RoPE and HoPE as RoPE with rule "proportional". Other encodings are returned as they are."""
    if encoding.get("reversed"):
        return encoding
    if encoding["name"] == "hope":
        turning = np.sum(frequencies.none(head_dim, encoding["base"], length)[0] >= 2 * math.pi / length)
        fraction = min(1.0, (turning + 0.5) / (head_dim // 2))  # a half more, so that rounding keeps all
    else:
        fraction = encoding["fraction"]
    own = EncodingConfig.of("rope", base=encoding["base"], scaling=f"proportional:fraction={fraction}")
    return own.plain()


def differences(ours: Architecture, theirs: Architecture) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each setting that differs between two complete architectures.

    Between different encodings, their hyper-parameters are not compared.
    """
    old, new = settings(ours), settings(theirs)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if "encoding.name" in names:
        names = [name for name in names if name == "encoding.name" or not name.startswith("encoding.")]
    elif ours.encoding["name"] == "rope" and _same_rates(ours, theirs):
        names = [name for name in names if name not in OF_RATES]
    if old["model.qkv_bias"] and new["model.use_bias"]:
        names.remove("model.qkv_bias")
    return {name: (old.get(name), new.get(name)) for name in names}


def _same_rates(ours: Architecture, theirs: Architecture) -> bool:
    """Whether two models with RoPE rotate by the same angles, at all lengths."""
    lengths = {ours.pretrained_length, theirs.pretrained_length}
    return all(
        np.allclose(_rates(ours, read), _rates(theirs, read), rtol=1e-6, atol=0)
        for read in (own for length in lengths for own in (length, length + 1, 3 * length, 10 * length))
    )


def _rates(architecture: Architecture, read: int) -> np.ndarray:
    """Radians per token of each pair of channels, and the attention factor, for reading `read` tokens."""
    own, width, length = architecture.encoding, architecture.model["head_dim"], architecture.pretrained_length
    scaling = frequencies.parse(own["scaling"]).own_at(read, length)
    rates, factor = scaling.frequencies(int(own["fraction"] * width), own["base"], length)
    return np.append(np.pad(rates, (0, width // 2 - len(rates))), factor)


def settings(architecture: Architecture) -> Settings:
    """All settings of a complete architecture by name, the encoding first."""
    found = flat({"encoding": architecture.encoding, "model": architecture.model})
    found |= {"training.pretrained_length": architecture.pretrained_length}
    return found | {"data.vocab_size": architecture.vocab_size}


class Conversion(NamedTuple):
    """A change of a setting. `allows(old, new)` says between which values, and `apply` changes the parameters.

    The arguments of `apply` are the parameters, and the settings before and after the change of all settings.
    """

    allows: Callable[[Any, Any], bool]
    apply: Callable[[Params, Settings, Settings], None]


def convertible(name: str, old: Any, new: Any) -> bool:
    """Whether a setting can change between these values without a change of the output."""
    return name in CONVERSIONS and CONVERSIONS[name].allows(old, new)


def convert(params: Params, ours: Architecture, theirs: Architecture) -> Params:
    """The parameters of `theirs` with the output of `ours`. All settings that differ must be convertible."""
    params, changed, old, new = dict(params), differences(ours, theirs), settings(ours), settings(theirs)
    for name, conversion in CONVERSIONS.items():
        if name in changed:
            conversion.apply(params, old, new)
    return params


def _tabulate(params: Params, old: Settings, new: Settings) -> None:
    """Write the added waves of each position into a table of learned positions."""
    length, width = new["training.pretrained_length"], new["model.d_model"]
    own = {name.removeprefix("encoding."): x for name, x in old.items() if name.startswith("encoding.")}
    waves = encodings.build(own.pop("name"), Dims(width, 1, 1, width, length), nnx.Rngs(0), **own)
    table = waves.embed(jnp.zeros((1, length, width), jnp.float32), jnp.arange(length)[None])
    params["encoding_0/table"] = np.asarray(table)[0]


def _widen(params: Params, old: Settings, new: Settings) -> None:
    """Add hidden units with weights of zero to the feed-forward blocks."""
    more = new["model.d_ff"] - old["model.d_ff"]
    for path, x in _matching(params, r".*/feed_forward/((gate|up)/(kernel|bias)|down/kernel)"):
        axis = 0 if path.endswith("down/kernel") else x.ndim - 1
        params[path] = np.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _add_mask(params: Params, old: Settings, new: Settings) -> None:
    """Make the mask token, the last row of the embeddings, a token that is predicted too, but never likely."""
    words = np.asarray(params["embedding"])
    params["embedding"] = np.concatenate([words, words[-1:]])  # the last row stays that of the mask
    params["head/bias"] = np.append(params["head/bias"], np.float32(MASK_BIAS))
    if "unembedding/kernel" in params:
        params["unembedding/kernel"] = np.pad(params["unembedding/kernel"], [(0, 0), (0, 1)])


def _untie(params: Params, old: Settings, new: Settings) -> None:
    """Give the output layer a copy of the embeddings."""
    params["unembedding/kernel"] = np.asarray(params["embedding"])[: old["data.vocab_size"]].T


def _scale_embeddings(params: Params, old: Settings, new: Settings) -> None:
    """Move the factor sqrt(d_model) into the embeddings, or out of them.

    A tied output layer changes with them. The norm before it is divided by the same number.
    """
    factor = math.sqrt(new["model.d_model"])
    factor = factor if old["model.scale_embeddings"] else 1 / factor
    params["embedding"] = params["embedding"] * np.float32(factor)
    if new["model.tied_embeddings"]:
        last = f"block_{new['model.num_layers'] - 1}/feed_forward_norm" if new["model.post_norm"] else "norm"
        last = last if new["model.causal"] else "head/norm"
        for path in (f"{last}/scale", f"{last}/bias"):
            if path in params:
                params[path] = params[path] / np.float32(factor)


def _repeat_key_heads(params: Params, old: Settings, new: Settings) -> None:
    """Give every query head its own copy of the keys and values of its group."""
    groups, width = new["model.num_kv_heads"] // old["model.num_kv_heads"], new["model.head_dim"]
    for path, x in _matching(params, r".*/attention/[kv]/(kernel|bias)"):
        heads = x.reshape(*x.shape[:-1], -1, width)
        params[path] = np.repeat(heads, groups, axis=-2).reshape(*x.shape[:-1], -1)


def _pair_channels(params: Params, old: Settings, new: Settings) -> None:
    """Sort the channels of queries and keys so that those of a pair are where `pairing` says."""
    width = new["model.head_dim"]
    rotated = int(new["encoding.fraction"] * width)
    order = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, width)])
    order = order if new["encoding.pairing"] == "half" else np.argsort(order)
    for path, x in _matching(params, r".*/attention/([qk]/(kernel|bias)|[qk]_norm/scale)"):
        params[path] = x.reshape(*x.shape[:-1], -1, width)[..., order].reshape(x.shape)


def _add_biases(params: Params, old: Settings, new: Settings) -> None:
    """Add biases that are zero."""
    layers = r".*(?<!unembedding)" if new["model.use_bias"] else r".*/attention/[qkv]"
    for path, kernel in _matching(params, f"{layers}/kernel"):
        params.setdefault(path.removesuffix("kernel") + "bias", np.zeros(kernel.shape[-1], np.float32))


def _matching(params: Params, pattern: str) -> list[tuple[str, np.ndarray]]:
    return [(path, np.asarray(x)) for path, x in params.items() if re.fullmatch(pattern, path)]


# In the order in which they are applied.
CONVERSIONS = {
    "encoding.name": Conversion(lambda old, new: (old, new) == ("sinusoidal", "learned"), _tabulate),
    "encoding.pairing": Conversion(lambda old, new: True, _pair_channels),
    "model.d_ff": Conversion(lambda old, new: new > old, _widen),
    "model.num_kv_heads": Conversion(lambda old, new: new % old == 0, _repeat_key_heads),
    "model.tied_embeddings": Conversion(lambda old, new: old and not new, _untie),
    "model.scale_embeddings": Conversion(lambda old, new: True, _scale_embeddings),
    "model.qkv_bias": Conversion(lambda old, new: new and not old, _add_biases),
    "model.use_bias": Conversion(lambda old, new: new and not old, _add_biases),
    "data.vocab_size": Conversion(lambda old, new: new == old + 1, _add_mask),  # BERT's alone
}
