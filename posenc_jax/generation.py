"""Text that a trained model continues: the model with its tokenizer, and the settings that depend on the length."""

import bisect
import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from configs import pretrained
from posenc_jax import positions
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.data.tokens import load_tokenizer
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.extrapolation import positions_fit, rule_at, scaled_constants
from posenc_jax.evaluation.scoring import evaluation_positions
from posenc_jax.models.decoding import Decoder, continuations
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.sampling import Sampling
from posenc_jax.runs import sources
from posenc_jax.schema import ConfigError
from posenc_jax.training import memory
from posenc_jax.training.step import abstract_model, initial_constants

BATCH = 8  # prompts that are continued together
MORE = 16  # tokens by which the longest of them may exceed 5/4 of the shortest, which are then read one by one
GREEDY = Sampling()


@dataclass(frozen=True)
class Generator:
    """A causal model that continues text: its settings, structure, arrays and tokenizer.

    A scaling rule, or positions, may depend on the length that is read. That is always the length of the prompt plus
    the number of new tokens. A rule that changed with every token would change the keys of earlier tokens too, and no
    cache could be kept.

    Attributes:
      rope_scaling: a rule for the encoding's frequencies, as in `config.evaluation.rope_scalings`.
      end_tokens: tokens after which a text ends. They are not part of it.
    """

    config: RunConfig
    graphdef: nnx.GraphDef
    params: Any
    constants: Any
    tokenizer: Tokenizer
    rope_scaling: str = "none"
    end_tokens: frozenset[int] = frozenset()

    @property
    def model(self) -> LanguageModel:
        return nnx.merge(self.graphdef, self.params, self.constants)

    def encode(self, text: str, field: str) -> Int[np.ndarray, "N"]:
        """The tokens of a prompt. Raises ConfigError, naming `field`, for one without tokens or with lost bytes."""
        try:
            ids = self.tokenizer.encode(text.encode())
        except UnicodeEncodeError:
            raise ConfigError(field, text, "must be text that can be encoded as UTF-8") from None
        except ConfigError as error:  # SmolLM has no tokens for some control characters
            raise ConfigError(field, text, error.allowed) from error
        if not len(ids):
            raise ConfigError(field, text, "must be text of at least one token")
        return ids.astype(np.int32)

    def bytes_of(self, token: int) -> bytes:
        """The text of one token, which may end inside a character."""
        return self.tokenizer.decode(np.array([token]))

    def check_length(self, prompt: int, new: int, field: str) -> None:
        """Raise ConfigError if the model cannot read a prompt, named `field`, and the new tokens after it."""
        table_length = self.model.table_length
        lengths = range(1, prompt + new + 1)
        most = bisect.bisect(lengths, False, key=lambda length: not positions_fit(self.config, table_length, length))
        if most == len(lengths):
            return
        has = f"the model has positions for {most} tokens"
        if prompt >= most:
            raise ConfigError(field, f"{prompt} tokens", f"must have fewer than {most} tokens, because {has}")
        allowed = f"must be at most {most - prompt} after a prompt of {prompt} tokens, because {has}"
        raise ConfigError("--tokens", new, allowed)

    def generate(
        self, prompts: Sequence[np.ndarray], new: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[list[tuple[int, int]]]:
        """Up to `new` tokens after each prompt: pairs of the prompt's index and its next token, step by step.

        The tokens of a prompt depend on the seed and on its index, not on the other prompts.
        """
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(len(prompts)))
        for rows in self._batches(prompts, new):
            total = max(len(prompts[i]) for i in rows) + new
            own = evaluation_positions(self.config, total)
            places = None if own is None else np.asarray(own)
            decoder = Decoder(self.graphdef, self.params, self._constants(total), total, places, sampling)
            filled = rows + rows[-1:] * (BATCH - len(rows) if len(prompts) > BATCH else 0)  # all batches: one program
            going = set(rows)
            for found in continuations(decoder, [prompts[i] for i in filled], new, keys[np.array(filled)]):
                step = [(i, token) for i, token in zip(rows, found, strict=False) if token is not None]
                going -= {i for i, token in step if token in self.end_tokens}
                if step := [(i, token) for i, token in step if i in going]:
                    yield step
                if not going:
                    break

    def _batches(self, prompts: Sequence[np.ndarray], new: int) -> Iterator[list[int]]:
        """Indices of prompts that are continued together: of similar lengths, and equal ones if the length matters."""

        def settings(i: int) -> tuple[str, int | None]:
            total = len(prompts[i]) + new
            return self._rule(total), total if positions.depend_on_length(self.config.positions) else None

        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for _, group in itertools.groupby(by_length, settings):
            batch: list[int] = []
            for i in group:
                if batch and (len(batch) == BATCH or len(prompts[i]) > len(prompts[batch[0]]) * 5 // 4 + MORE):
                    yield batch
                    batch = []
                batch.append(i)
            yield batch

    def _rule(self, total: int) -> str:
        """The scaling rule for reading so many tokens."""
        return rule_at(self.config, self.rope_scaling, total)

    def _constants(self, total: int) -> Any:
        return scaled_constants(self.config, self.constants, self._rule(total))


def load(name: str, rope_scaling: str = "none") -> Generator:
    """The model in a workdir, a Hugging Face folder, a .gguf file, or "smollm2", on the first device.

    Raises ConfigError, which names the argument MODEL or --rope_scaling, WorkdirError and CheckpointError.
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
        raise sources.error_of("MODEL", name, error) from error
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
