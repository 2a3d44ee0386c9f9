"""Fields of config.json that several families write in the same way."""

from collections.abc import Mapping
from typing import Any

from posenc_jax.interop import rope_scaling
from posenc_jax.interop.family import Architecture
from posenc_jax.interop.rope_scaling import Rope
from posenc_jax.schema import ConfigError


def check_widths(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model. Raises ConfigError unless the number of heads divides the width, as families demand."""
    if model["d_model"] % model["num_heads"]:
        raise ConfigError("config.model.num_heads", model["num_heads"], f"must divide d_model = {model['d_model']}")
    return model


def theirs(known: Mapping[str, str], ours: str) -> str:
    """The foreign name of a value, or the first name for a value without one. `known` maps names to our values."""
    return next((name for name, own in known.items() if own == ours), next(iter(known)))


def windowed(architecture: Architecture) -> list[bool]:
    """Whether each layer has a window."""
    return [architecture.model["window"] > 0 and letter == "E" for letter in architecture.model["pattern"]]


def layer_types(architecture: Architecture) -> list[str]:
    """The kind of each layer."""
    return ["sliding_attention" if own else "full_attention" for own in windowed(architecture)]


def write_rope(architecture: Architecture, **options: Any) -> dict[str, Any]:
    """The fields of RoPE and of the context length. `options` are those of `rope_scaling.write`.

    Another encoding is written as RoPE with its defaults.
    """
    own = architecture.encoding if architecture.encoding["name"] == "rope" else {}
    rope = Rope(
        own.get("base", 10000.0), own.get("fraction", 1.0), own.get("scaling", "none"), architecture.pretrained_length
    )
    return rope_scaling.write(rope, architecture.model["head_dim"], **options)
