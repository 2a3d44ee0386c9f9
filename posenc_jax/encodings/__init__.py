"""The table of encodings. To add one: a class in a file of this folder, and a row here.

jax is imported when the first encoding is looked up, not before.
"""

from typing import TYPE_CHECKING, Any

from posenc_jax import registry
from posenc_jax.schema import convert, plain

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
    "rope_pp": "imaginary.RoPEPlusPlus",
    "xpos": "rotary.XPos",
    "fope": "rotary.FoPE",
    "pope": "rotary.PoPE",
    "decoupled_rope": "decoupled.DecoupledRoPE",
    "selective_rope": "selective.SelectiveRoPE",
    "carope": "selective.CARoPE",
    "alibi": "bias.ALiBi",
    "hard_alibi": "reach.HardALiBi",
    "bam": "reach.BAM",
    "kerple": "bias.KERPLE",
    "sandwich": "bias.Sandwich",
    "t5": "bias.T5",
    "fire": "bias.FIRE",
    "dynamic_bias": "bias.DynamicBias",
    "shaw": "contextual.Shaw",
    "transformer_xl": "contextual.TransformerXL",
    "deberta": "contextual.DeBERTa",
    "tapa": "contextual.TAPA",
    "cope": "contextual.CoPE",
    "dape": "contextual.DAPE",
    "dape_v2": "contextual.DAPEV2",
    "fox": "gated.FoX",
    "fox_fixed": "gated.FoXFixed",
    "wall": "gated.Wall",
    "path": "gated.PaTH",
    "grape_m": "grape.GRAPEM",
    "grape_a": "grape.GRAPEA",
    "grape_ap": "grape.GRAPEAP",
    "stick_breaking": "gated.StickBreaking",
}


def names() -> tuple[str, ...]:
    """The names that `build` and `--config=FILE.py:encoding=NAME` take."""
    return tuple(TABLE)


def load(name: Any, field: str = "encoding") -> "type[Encoding]":
    """The class of one encoding; its settings are the fields of its `Config`.

    Raises ConfigError, naming `field`, for a name that is not in the table.
    """
    return registry.find(TABLE, __name__, name, field)


def default_config(name: str) -> dict[str, Any]:
    """The hyper-parameters of one encoding, at their defaults."""
    return plain(load(name).Config())


def build(encoding: "str | type[Encoding]", dims: "Dims", rngs: "nnx.Rngs", **hyperparameters: Any) -> "Encoding":
    """An encoding with these hyper-parameters, the others at their defaults.

    Args:
      encoding: a name of the table, or a class of your own, which needs no row in it.
      dims: the sizes of the model. `posenc_jax.attention.attention` refuses arrays of other sizes.
      rngs: its stream `params` gives the initial values.

    Raises:
      ConfigError: for a name, or a hyper-parameter, that does not exist or has a wrong value.
      TypeError: for a class that cannot work as it is written. The message says what to change.
    """
    from posenc_jax.encodings import base  # imports jax

    if isinstance(encoding, type) and issubclass(encoding, base.Encoding):
        cls, name = encoding, encoding.__name__
    else:
        cls, name = load(encoding), encoding
    return base.construct(cls, convert(cls.Config, hyperparameters, f"encoding {name!r}"), dims, rngs)
