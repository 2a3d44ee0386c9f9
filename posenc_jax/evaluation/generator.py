"""Text that a causal model with its tokenizer generates, and the settings that depend on the length."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from posenc_jax import positions
from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.evaluation.extrapolation import positions_fit, rule_at, structure_under
from posenc_jax.evaluation.scoring import evaluation_positions
from posenc_jax.models.decoding import Decoder, continuations
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.sampling import Sampling
from posenc_jax.schema import ConfigError

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

    def check_length(self, prompt: int, new: int, field: str, new_field: str) -> None:
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
        raise ConfigError(new_field, new, allowed)

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
            graphdef, constants = self._structure(total)
            decoder = Decoder(graphdef, self.params, constants, total, places, sampling)
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

    def _structure(self, total: int) -> tuple[nnx.GraphDef, Any]:
        return structure_under(self.config, self.graphdef, self.params, self.constants, self._rule(total))
