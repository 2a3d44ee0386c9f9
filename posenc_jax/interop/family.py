"""What a family of foreign models is: the meaning of its settings, and of each tensor of its files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from posenc_jax.interop.fields import Fields


class Architecture(NamedTuple):
    """A foreign model in the settings of this project.

    `model` has fields of config.model, and `encoding` those of config.encoding; others have their defaults.
    `pretrained_length` is the context, in tokens, that the weights were first trained on. `own` holds what else the
    tensors of the family depend on.
    """

    model: dict[str, Any]
    encoding: dict[str, Any]
    pretrained_length: int
    vocab_size: int
    own: Mapping[str, Any] = MappingProxyType({})


class Tensor(NamedTuple):
    """Tensors of a file, by name, and the parameters that they hold, by paths such as "block_0/attention/q/kernel".

    `unpack(*tensors)` returns the arrays of these parameters, and `pack(*parameters)` is its inverse. A parameter that
    is zero in the family has no tensors: `names` is then empty.
    """

    names: tuple[str, ...]
    params: tuple[str, ...]
    unpack: Callable[..., tuple[np.ndarray, ...]]
    pack: Callable[..., tuple[np.ndarray, ...]]


class Names(NamedTuple):
    """What files may do with the names of tensors.

    Attributes:
      prefix: a beginning that some files omit.
      renamed: parts of names that older files have, and those that replace them.
      copies: tensors that tied weights make equal to another one. Files may hold both.
      unused: ends of the names of tensors that have no part in the logits, or that are computed here.
    """

    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


@runtime_checkable
class Family(Protocol):
    """A module of `posenc_jax.interop.families`."""

    NAMES: Names

    def read(self, fields: Fields) -> Architecture:
        """The settings that a config.json describes. Raises ConfigError for fields without counterpart."""
        ...

    def tensors(self, architecture: Architecture) -> Iterator[Tensor]:
        """The tensors that the files of such a model hold."""
        ...

    def write(self, architecture: Architecture, model_type: str) -> dict[str, Any]:
        """The fields of config.json for these settings, the inverse of `read`.

        All settings are given, with one letter per layer in the pattern. Settings and values that the family does not
        have may be ignored, because `hf_writer` compares the settings with those that `read` finds in the fields.
        Raises ConfigError for values that `read` accepts and transformers does not.
        """
        ...


GELU = {  # values of hidden_act and the like, and the activation that each one is
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
}


def widths(fields: Fields, width: str, heads: str) -> dict[str, Any]:
    """The widths of a model whose heads divide its width, from the fields of these names."""
    found, count = fields.count(width), fields.count(heads)
    if found % count:
        raise fields.error(heads, count, f"must divide {width} = {found}")
    return {"d_model": found, "num_heads": count, "num_kv_heads": count, "head_dim": found // count}


def same(name: str, param: str) -> Tensor:
    """A tensor that is a parameter as it is."""
    return Tensor((name,), (param,), lambda x: (x,), lambda x: (x,))


def transposed(name: str, param: str) -> Tensor:
    """A kernel [out, in], as PyTorch's linear layers have it; ours are [in, out]."""
    return Tensor((name,), (param,), lambda x: (x.T,), lambda x: (x.T,))


def rescaled(tensor: Tensor, by: float, shift: float = 0.0) -> Tensor:
    """Parameters that are (x + shift) * by for those that a tensor unpacks to."""
    plus, times = np.float32(shift), np.float32(by)
    return tensor._replace(
        unpack=lambda *arrays: tuple((np.asarray(x, np.float32) + plus) * times for x in tensor.unpack(*arrays)),
        pack=lambda *arrays: tensor.pack(*(np.asarray(x, np.float32) / times - plus for x in arrays)),
    )


def linear(name: str, param: str, stored: bool, biased: bool = False) -> Iterator[Tensor]:
    """Kernel and bias of a linear layer. If it is `biased` and no bias is `stored`, the bias is zero."""
    yield transposed(f"{name}.weight", f"{param}/kernel")
    if stored:
        yield same(f"{name}.bias", f"{param}/bias")
    elif biased:
        yield zeros(f"{param}/bias")


def layer_norm(name: str, param: str, stored: bool = True) -> Iterator[Tensor]:
    """Scale and bias of a layer norm. If no bias is `stored`, it is zero."""
    yield same(f"{name}.weight", f"{param}/scale")
    yield same(f"{name}.bias", f"{param}/bias") if stored else zeros(f"{param}/bias")


def fused_heads(name: str, param: str, heads: int, bias: bool) -> Iterator[Tensor]:
    """Linear layers of queries, keys and values in one, whose rows are [head, query or key or value, head_dim]."""

    def unpack(x):
        parts = np.moveaxis(x.reshape(heads, 3, -1, *x.shape[1:]), 1, 0)
        return tuple(part.reshape(-1, *x.shape[1:]).T for part in parts)

    def pack(*parts):
        rows = [part.T.reshape(heads, -1, *part.T.shape[1:]) for part in parts]
        return (np.stack(rows, axis=1).reshape(-1, *rows[0].shape[2:]),)

    yield Tensor((f"{name}.weight",), tuple(f"{param}/{part}/kernel" for part in "qkv"), unpack, pack)
    if bias:
        yield Tensor((f"{name}.bias",), tuple(f"{param}/{part}/bias" for part in "qkv"), unpack, pack)


def concatenated(name: str, params: tuple[str, ...], axis: int, transpose: bool = False) -> Tensor:
    """Parameters of equal shapes in one tensor, one after the other along an axis of the tensor."""

    def unpack(x):
        parts = np.split(x, len(params), axis)
        return tuple(part.T for part in parts) if transpose else tuple(parts)

    def pack(*parts):
        return (np.concatenate([part.T if transpose else part for part in parts], axis),)

    return Tensor((name,), params, unpack, pack)


def zeros(*params: str) -> Tensor:
    """Parameters that the files do not hold, and that are zero."""
    return Tensor((), params, lambda: (), lambda *arrays: ())


def layer_windows(fields: Fields, default: Sequence[bool]) -> list[bool]:
    """Whether each layer has a window, from the field `layer_types`. `default` stands for an absent field."""
    given, known = fields.take("layer_types", list, None), ("full_attention", "sliding_attention")
    if given is None:
        return list(default)
    if len(given) != len(default) or any(kind not in known for kind in given):
        raise fields.error("layer_types", given, f"must be {' or '.join(known)} for each of {len(default)} layers")
    return [kind == known[1] for kind in given]


def layer_pattern(windowed: Sequence[bool], encoded: Sequence[bool]) -> str:
    """The pattern of config.model for layers with or without window and encoding; none has a window alone."""
    full = "G" if any(windowed) else "E"
    letters = ("E" if window else full if own else "N" for window, own in zip(windowed, encoded, strict=True))
    return period("".join(letters))


def period(letters: str) -> str:
    """The shortest text whose repetition begins with these letters: "EEEN" for "EEENEEENEE"."""
    lengths = range(1, len(letters) + 1)
    return next(letters[:n] for n in lengths if (letters[:n] * len(letters)).startswith(letters))
