"""Hugging Face folders: config.json, tokenizer.json, and weights in one or more safetensors files."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from posenc_jax.errors import one_line
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import read_bytes, read_json

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TOKENIZER_BYTES = 1 << 27


class HFFolder:
    """The files of a folder. Tensors are read one at a time.

    Raises ConfigError for missing files and damaged weights, and DamagedError for damaged JSON.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise self._error("must be a folder with a config.json, a .gguf file or 'smollm2'")
        self.config = self._json("config.json")
        self.weights = self._find_weights()
        self._open, self._files = ExitStack(), dict[str, Any]()
        for file in self.weights:
            try:
                handle = self._open.enter_context(safe_open(file, framework="flax"))
            except (SafetensorError, OSError) as error:
                raise self._error(f"{file.name} is damaged: {one_line(error)}") from None
            for name in handle.keys():  # noqa: SIM118 (it is no mapping)
                if name in self._files:
                    raise self._error(f"has tensor {name!r} in two files, of which one is {file.name}")
                self._files[name] = handle
        if (path / INDEX).is_file():
            listed = self._json(INDEX).get("weight_map", {})
            if missing := sorted(set(listed) - set(self._files)):
                raise self._error(f"lacks tensor {missing[0]!r}, which {INDEX} lists")

    def tokenizer(self) -> str:
        """The JSON of the tokenizer."""
        if not (self.path / "tokenizer.json").is_file():
            raise self._error("must have a tokenizer.json: the weights are of no use with other tokens")
        return read_bytes(self.path / "tokenizer.json", MAX_TOKENIZER_BYTES).decode(errors="replace")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        try:
            return np.asarray(self._files[name].get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise self._error(f"tensor {name!r} cannot be read: {one_line(error)}") from None

    def _json(self, name: str) -> dict[str, Any]:
        value = read_json(self.path / name)
        if not isinstance(value, dict):
            raise self._error(f"{name} must hold a JSON object")
        return value

    def _find_weights(self) -> list[Path]:
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLES)
            told = f"; {pickles[0]} is a pickle, which can run any code, so it is never opened" if pickles else ""
            raise self._error(f"must have its weights in *.safetensors{told}")
        return found

    def _error(self, allowed: str) -> ConfigError:
        return ConfigError("config.init_from", str(self.path), allowed)
