"""The table of encodings. To add one: a class in a file of this folder, and a row here.

Nothing here imports jax until `build`, so that settings are checked at once.
"""

import ast
import dataclasses
import functools
import importlib
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posenc_jax import schema as _schema
from posenc_jax.encodings import frequencies

if TYPE_CHECKING:
    from flax import nnx

    from posenc_jax.encodings.base import Dims, Encoding

TABLE = {  # name: file and class
    "none": "base.Encoding",
    "sinusoidal": "absolute.Sinusoidal",
    "learned": "absolute.Learned",
    "rope": "rotary.RoPE",
    "p_rope": "rotary.PRoPE",
    "hope": "rotary.HoPE",
    "learned_rope": "rotary.LearnedRoPE",
    "xpos": "xpos.XPos",
    "fope": "fope.FoPE",
    "pope": "pope.PoPE",
    "selective_rope": "selective_rope.SelectiveRoPE",
    "alibi": "bias.ALiBi",
    "kerple": "bias.KERPLE",
    "sandwich": "bias.Sandwich",
    "t5": "bias.T5",
    "fire": "bias.FIRE",
    "dynamic_bias": "bias.DynamicBias",
    "shaw": "contextual.Shaw",
    "transformer_xl": "contextual.TransformerXL",
    "cope": "contextual.CoPE",
    "dape": "contextual.DAPE",
    "dape_v2": "contextual.DAPEV2",
    "fox": "gated.FoX",
    "fox_fixed": "gated.FoXFixed",
    "wall": "gated.Wall",
    "path": "products.PaTH",
    "grape_m": "grape.GRAPEM",
    "grape_a": "grape.GRAPEA",
    "grape_ap": "grape.GRAPEAP",
    "stick_breaking": "stick_breaking.StickBreaking",
}


def names() -> tuple[str, ...]:
    """The names that `build` and `--config=FILE.py:encoding=NAME` take."""
    return tuple(TABLE)


def default_config(name: str) -> dict[str, Any]:
    """The hyper-parameters of one encoding, at their defaults."""
    return _schema.plain(schema(name)())


def schema(name: Any, field: str = "encoding") -> type:
    """The `Config` dataclass of one encoding; raises ConfigError, naming `field`, for a name not in the table."""
    if not isinstance(name, str) or name not in TABLE:
        raise _schema.ConfigError(field, name, "must be one of: " + ", ".join(TABLE), TABLE)
    return _config_class(name)


@functools.cache
def _config_class(name: str) -> type:
    """Read from the source: importing the encoding would import jax."""
    module, class_name = TABLE[name].split(".")
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    (config,) = (node for node in owner.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    namespace = {**vars(typing), **vars(_schema), **vars(dataclasses)}
    namespace |= {"frequencies": frequencies, "__name__": __name__}
    exec(compile(ast.Module([config], []), module, "exec"), namespace)
    return namespace["Config"]


def load(name: str) -> "type[Encoding]":
    """The class of one encoding."""
    schema(name)
    module, class_name = TABLE[name].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)


def build(name: str, dims: "Dims", rngs: "nnx.Rngs", **hyperparameters: Any) -> "Encoding":
    """An encoding with the given hyper-parameters, the others at their defaults. Raises ConfigError."""
    cls = load(name)
    return cls(_schema.convert(cls.Config, hyperparameters, f"encoding {name!r}"), dims, rngs)
