"""The table of foreign families. To add one: a module of this folder with `read`, `tensors` and `write`, and a row."""

import importlib
from typing import Any, cast

from posenc_jax.interop.family import Family
from posenc_jax.schema import ConfigError

# model_type of config.json: (architecture with an output layer, module of this folder)
TABLE = {
    "llama": ("LlamaForCausalLM", "llama"),
    "smollm3": ("SmolLM3ForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "llama"),
}


def load(model_type: Any, field: str) -> Family:
    """The module that reads models of this type. Raises ConfigError, naming `field`, for an unknown type."""
    if model_type not in TABLE:
        raise ConfigError(field, model_type, "must be one of: " + ", ".join(TABLE), TABLE)
    return cast(Family, importlib.import_module(f"{__name__}.{TABLE[model_type][1]}"))
