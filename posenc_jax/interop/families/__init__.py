"""The table of foreign families. To add one: a module of this folder with `read`, `tensors` and `write`, and a row."""

import importlib
from collections.abc import Mapping
from typing import Any

from posenc_jax.schema import ConfigError

# model_type of config.json: (architecture with an output layer, module of this folder)
TABLE = {
    "bert": ("BertForMaskedLM", "bert"),
    "bloom": ("BloomForCausalLM", "bloom"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma"),
    "gemma3_text": ("Gemma3ForCausalLM", "gemma"),
    "gpt2": ("GPT2LMHeadModel", "gpt2"),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox"),
    "llama": ("LlamaForCausalLM", "llama"),
    "mpt": ("MptForCausalLM", "mpt"),
    "qwen2": ("Qwen2ForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "llama"),
    "smollm3": ("SmolLM3ForCausalLM", "llama"),
}


def load(config: Mapping[str, Any], path: str) -> Any:
    """The `Family` that reads models with this config.json. Raises ConfigError, with `path`, for unknown types."""
    model_type, field = config.get("model_type"), f"{path}: model_type"
    if "text_config" in config:
        raise ConfigError(field, model_type, "is a model of text with images or sound; only models of text are read")
    if not isinstance(model_type, str) or model_type not in TABLE:
        raise ConfigError(field, model_type, "must be one of: " + ", ".join(TABLE), TABLE)
    return importlib.import_module(f"{__name__}.{TABLE[model_type][1]}")
