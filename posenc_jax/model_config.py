"""The settings of a model, apart from those of its positional encoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from posenc_jax.schema import ConfigError, NonNegative, Positive, Range, convert

Width = Annotated[int, Range(at_least=1, at_most=2**20)]
RECURRENT = ("rnn", "lstm", "gru", "elmo")


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a recurrent model, which a transformer has too; `architecture` names the model.

    The defaults are those of configs/base.py, for models that are built by hand. A run has to give every setting.
    """

    architecture: str = "transformer"
    num_layers: Annotated[int, Range(at_least=1, at_most=1000)] = 4  # each layer is traced separately
    d_model: Width = 128
    tied_embeddings: bool = True
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @classmethod
    def parse(cls, value: Any, path: str) -> "ModelConfig":
        if not isinstance(value, Mapping) or "architecture" not in value:
            raise ConfigError(path, value, "must be a section with an architecture")
        name, known = value["architecture"], ("transformer", *RECURRENT)
        if name not in known:
            raise ConfigError(f"{path}.architecture", name, "must be one of: " + ", ".join(known), known)
        if name == "transformer":
            return convert(TransformerConfig, value, path, complete=True)
        own, of_attention = (set(kind.__dataclass_fields__) for kind in (cls, TransformerConfig))
        if given := value.keys() & (of_attention - own):
            allowed = f"{min(given)} applies only to transformers; write --config=configs/recurrent.py:cell={name}"
            raise ConfigError(f"{path}.architecture", name, allowed)
        return convert(cls, value, path, complete=True)


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    causal: bool = True
    pattern: str = "E"
    window: Annotated[int, Range(at_least=0)] = 0
    num_heads: Width = 2
    num_kv_heads: Width = 2
    head_dim: Width = 64
    d_ff: Width = 384
    activation: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    qk_norm: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Positive = 1e-6
    post_norm: bool = False
    branch_norm: bool = False
    embedding_norm: bool = False
    parallel_residual: bool = False
    use_bias: bool = False
    qkv_bias: bool = False
    scale_embeddings: bool = True
    attention_sinks: bool = False
    attention_gate: bool = False
    canon: bool = False
    attention_softcap: NonNegative = 0.0
    logit_softcap: NonNegative = 0.0

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a third matrix, whose output gates its hidden units."""
        return self.activation.endswith("glu")
