"""What a family of foreign models is: the meaning of its settings, and of each tensor of its files."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from posenc_jax.interop.fields import Fields


class Architecture(NamedTuple):
    """A foreign model in the settings of this project.

    `model` has fields of config.model, and `encoding` those of config.encoding; others have their defaults.
    `pretrained_length` is the context, in tokens, that the weights were first trained on.
    """

    model: dict[str, Any]
    encoding: dict[str, Any]
    pretrained_length: int
    vocab_size: int


class Tensor(NamedTuple):
    """A tensor of a file, by name, and the parameters that it holds, by paths such as "block_0/attention/q/kernel".

    `unpack(array)` returns the arrays of these parameters, and `pack(*arrays)` is its inverse.
    """

    name: str
    params: tuple[str, ...]
    unpack: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    pack: Callable[..., np.ndarray]


class Family(Protocol):
    """A module of `posenc_jax.interop.families`."""

    def read(self, fields: Fields) -> Architecture:
        """The settings that a config.json describes. Raises ConfigError for fields without counterpart."""
        ...

    def tensors(self, architecture: Architecture) -> Iterator[Tensor]:
        """The tensors that the files of such a model hold."""
        ...

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The fields of config.json for these settings, the inverse of `read`.

        Raises ConfigError, naming a setting, if the family cannot express it.
        """
        ...


def same(name: str, param: str) -> Tensor:
    """A tensor that is a parameter as it is."""
    return Tensor(name, (param,), lambda x: (x,), lambda x: x)


def transposed(name: str, param: str) -> Tensor:
    """A kernel [out, in], as PyTorch's linear layers have it; ours are [in, out]."""
    return Tensor(name, (param,), lambda x: (x.T,), lambda x: x.T)


def shifted(name: str, param: str, by: float) -> Tensor:
    """A parameter minus a number: Gemma's norms multiply by 1 + weight."""
    return Tensor(name, (param,), lambda x: (x + np.float32(by),), lambda x: x - np.float32(by))


def linear(name: str, param: str, bias: bool) -> Iterator[Tensor]:
    """Kernel, and bias if there is one, of a linear layer."""
    yield transposed(f"{name}.weight", f"{param}/kernel")
    if bias:
        yield same(f"{name}.bias", f"{param}/bias")


def zeros(param: str) -> Tensor:
    """A parameter that the files do not hold, and that is zero."""
    return Tensor("", (param,), lambda x: (x,), lambda x: x)


def period(letters: str) -> str:
    """The shortest text whose repetition begins with these letters: "EEEN" for "EEENEEENEE"."""
    lengths = range(1, len(letters) + 1)
    return next(letters[:n] for n in lengths if (letters[:n] * len(letters)).startswith(letters))
