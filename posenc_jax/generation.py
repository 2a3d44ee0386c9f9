"""Loads a trained model with its tokenizer, to continue text."""

import codecs
from collections.abc import Iterable, Iterator

import jax

from configs import pretrained
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.data.tokens import load_tokenizer
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.generator import Generator
from posenc_jax.runs import sources
from posenc_jax.schema import ConfigError
from posenc_jax.training import memory
from posenc_jax.training.step import abstract_model, initial_constants


def load(name: str, rope_scaling: str = "none", *, field: str = "MODEL") -> Generator:
    """The model in a workdir, a Hugging Face folder, a .gguf file, or "smollm2", on the first device.

    Raises ConfigError, which names the argument `field` or --rope_scaling, WorkdirError and CheckpointError.
    """
    settings, mesh = pretrained.get_config().to_dict(), sharding.make_mesh(1, jax.devices()[:1])
    settings["init_from"] = name
    settings["evaluation"] |= {"windows": 1, "rope_scalings": ("none",)}  # nothing is evaluated
    try:
        config = RunConfig.from_mapping(sources.resolve(settings))
        if config.masks_tokens:
            allowed = "must be a causal model: an encoder predicts masked tokens, not the next one"
            raise ConfigError(sources.FIELD, name, allowed)
        rule = checked_rule(config, rope_scaling, "--rope_scaling")
        memory.check_fits(config, mesh, trains=False)
        source = sources.of_run(config)
        assert source is not None  # the settings have an `init_from`
        arrays = source.load(config, mesh)
    except ConfigError as error:
        if error.field == "--rope_scaling":
            raise
        raise sources.error_of(field, name, error) from error
    constants = arrays["constants"] if "constants" in arrays else initial_constants(config, mesh)
    graphdef, _ = abstract_model(config, dropped=config.training.drope.amount > 0)
    tokenizer = load_tokenizer(config.data, source.tokenizer)
    return Generator(config, graphdef, arrays["params"], constants, tokenizer, rule, source.end_tokens)


def checked_rule(config: RunConfig, rule: str, field: str) -> str:
    """The text of a scaling rule for the model of these settings. Raises ConfigError, naming `field`."""
    scaling, own = frequencies.parse(rule, field), config.encoding.hyperparameters
    if scaling.rule == "none":
        return str(scaling)
    if not hasattr(own, "scaling"):
        allowed = f"must be 'none' for encoding {config.encoding.name!r}, which has no frequencies to scale"
        raise ConfigError(field, rule, allowed)
    assert isinstance(config.model, TransformerConfig)  # others have the encoding "none"
    scaling.check(int(own.fraction * config.model.head_dim), own.base, config.pretrained_reach, (), field)
    return str(scaling)


def decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    """Text as soon as its bytes are complete characters. Bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
