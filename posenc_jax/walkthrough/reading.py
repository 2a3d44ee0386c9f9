"""What a trained model computes from the sentence: as trained, without its encoding, and with all positions moved."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MOVED = 1000  # tokens by which all positions are moved
NEXT = 5  # number of tokens whose probabilities are shown


@dataclass(frozen=True)
class Reading:
    """What a model computes from the sentence."""

    weights: Float[np.ndarray, "L H T T"]  # of attention, for each layer, head, query and key
    following: Float[np.ndarray, "V"]  # probability of each token to come next


@dataclass(frozen=True)
class Trained:
    """Three readings of the sentence, and the head that gives the previous token most weight in the first one."""

    model: str
    encoding: str
    layer: int  # counted from 0, like the head
    head: int
    likely: tuple[str, ...]  # the tokens that are most likely to come next
    likely_ids: Int[np.ndarray, "n"]
    plain: Reading
    without: Reading  # no layer uses the encoding
    moved: Reading | None  # None if the model has no positions so far

    def weights(self, reading: Reading) -> Float[np.ndarray, "T T"]:
        """The attention weights of the head."""
        return reading.weights[self.layer, self.head]

    def previous(self, reading: Reading) -> float:
        """The mean weight that the head gives to the previous token."""
        return float(to_previous(reading.weights)[self.layer, self.head])


def to_previous(weights: Float[np.ndarray, "L H T T"]) -> Float[np.ndarray, "L H"]:
    """The mean weight that each head gives to the previous token, over all queries but the first."""
    return np.diagonal(weights, -1, -2, -1).mean(axis=-1)
