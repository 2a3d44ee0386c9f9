"""Hugging Face folders: config.json, tokenizer.json, and weights in one or more safetensors files."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from posenc_jax.errors import one_line
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import read_bytes, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TOKENIZER_BYTES = 1 << 27
ENCODERS = ("bert",)  # types of models whose masked tokens have an id
MASK_TOKENS = ("[MASK]", "<mask>")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class _Stored(NamedTuple):
    """A tensor in a file: its first byte there, dtype as the file names it, and shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class HFFolder:
    """The files of a folder. Tensors are read one at a time, so that no part of a file stays in memory.

    Raises ConfigError for missing files and damaged weights, and DamagedError for damaged JSON.

    Attributes:
      config: the fields of config.json. An encoder gets the `mask_token_id` of tokenizer.json, if it is there.
      weights: the files of the weights.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise self._error("must be a folder with a config.json, a .gguf file or 'smollm2'")
        self.config = self._json("config.json")
        listed = self._listed()
        self.weights = sorted({path / name for name in listed.values()}) or [path / WEIGHTS]
        self._stored: dict[str, _Stored] = {}
        for file in self.weights:
            if not file.is_file():
                raise self._error(self._missing(file))
            for name, stored in self._header(file).items():
                if name in self._stored:
                    raise self._error(f"has tensor {name!r} in two files: {self._stored[name].file.name}, {file.name}")
                self._stored[name] = stored
        if missing := sorted(listed.keys() - self._stored.keys()):
            raise self._error(f"lacks tensor {missing[0]!r}, which {INDEX} lists")
        if self.config.get("model_type") in ENCODERS and (path / "tokenizer.json").is_file():
            self.config = self._mask_token() | self.config

    def tokenizer(self) -> str:
        """The JSON of the tokenizer."""
        if not (self.path / "tokenizer.json").is_file():
            raise self._error("must have a tokenizer.json: the weights are of no use with other tokens")
        return read_bytes(self.path / "tokenizer.json", MAX_TOKENIZER_BYTES).decode(errors="replace")

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: `eos_token_id` of generation_config.json, or else of config.json."""
        name, config = "generation_config.json", self.config
        if (self.path / name).is_file():
            config = config | self._json(name)
        found = config.get("eos_token_id")
        tokens = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in tokens):
            raise self._error(f"eos_token_id = {found!r} must be a token id, or a list of them")
        return frozenset(tokens)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file. Raises ConfigError unless it has floating-point numbers."""
        file, offset, dtype, shape = self._stored[name]
        if dtype not in DTYPES:
            raise self._error(f"tensor {name!r} has dtype {dtype}; must be one of: {', '.join(DTYPES)}")
        count = math.prod(shape)
        with file.open("rb") as opened:
            opened.seek(offset)
            content = opened.read(count * np.dtype(DTYPES[dtype]).itemsize)
        if len(content) != count * np.dtype(DTYPES[dtype]).itemsize:
            raise self._error(f"{file.name} has become shorter")
        return np.frombuffer(content, DTYPES[dtype]).reshape(shape)

    def _listed(self) -> dict[str, str]:
        """The file of each tensor, from the index; empty without an index."""
        if (self.path / WEIGHTS).is_file() or not (self.path / INDEX).is_file():
            return {}
        listed = self._json(INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise self._error(f"{INDEX} must have a weight_map of file names")
        for name, file in listed.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise self._error(f"{INDEX} gives tensor {name!r} the file {file!r}; must be a *.safetensors beside it")
        return listed

    def _header(self, file: Path) -> dict[str, _Stored]:
        """The tensors of a file, whose header the library has checked against its size."""
        try:
            with safe_open(file, framework="numpy"), open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise self._error(f"{file.name} is damaged: {one_line(error)}") from None
        return {
            name: _Stored(file, 8 + length + own["data_offsets"][0], own["dtype"], tuple(own["shape"]))
            for name, own in header.items()
            if name != "__metadata__"
        }

    def _mask_token(self) -> dict[str, Any]:
        tokens = self._json("tokenizer.json").get("added_tokens")
        found = [token for token in tokens or () if isinstance(token, dict) and token.get("content") in MASK_TOKENS]
        return {"mask_token_id": found[0].get("id")} if found else {}

    def _missing(self, file: Path) -> str:
        """What is wrong with a folder that lacks a file of weights."""
        pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLES)
        told = f"; {pickles[0]} is a pickle, which can run any code, so it is never opened" if pickles else ""
        return f"must have its weights in {file.name}{told}"

    def _json(self, name: str) -> dict[str, Any]:
        value = read_json(self.path / name)
        if not isinstance(value, dict):
            raise self._error(f"{name} must hold a JSON object")
        return value

    def _error(self, allowed: str) -> ConfigError:
        return ConfigError("config.init_from", str(self.path), allowed)
