"""Encodings whose heads differ in how far they see: some heads see few tokens, others all."""

from dataclasses import dataclass, field
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from flax import nnx

from posenc_jax.encodings.base import Dims, DistanceBias, constant
from posenc_jax.schema import Positive, Range

HIDDEN = -1e9  # a logit that makes a weight exactly zero


class HardALiBi(DistanceBias):
    r"""Hard-ALiBi: head h sees only the last h tokens, and the remaining heads see all tokens without a position.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} - \infty\,[i - j \ge h] \text{ for } h \le f H,
        \text{ else } q_i \cdot k_j / \sqrt{d}, \quad h = 1 .. H

    f is `fraction`, of the heads. The first head sees only the query's own token. Together, the heads that see few
    tokens tell the order of the last f H tokens, and the others can find these anywhere in the text. This suits copying
    (Jelassi et al.: strings of 1,000 tokens after training on 50). Nothing is learned. Source: Jelassi et al. 2024,
    §3.2, with the reaches 1, 2, 3 .. of the authors' code.
    """

    @dataclass(frozen=True)
    class Config:
        fraction: Annotated[float, Range(above=0, at_most=1)] = 0.5  # of the heads, which see few tokens

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        reach = np.arange(1.0, dims.num_heads + 1)
        reach[max(1, int(config.fraction * dims.num_heads)) :] = np.inf
        self.reach = constant(reach)  # [H] tokens

    def distance_bias(self, distance):
        far = jnp.expand_dims(self.reach[...], tuple(range(1, distance.ndim + 1))) <= distance
        return jnp.where(far, jnp.float32(HIDDEN), 0.0)


class BAM(DistanceBias):
    r"""Bayesian attention mechanism: minus a learned power of the distance, the logarithm of a generalized Gaussian.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} - e^{\alpha_h} \big(|i - j + \mu_h| + \epsilon\big)^{\beta_h}

    beta = 1 is ALiBi, beta = 2 a Gaussian, and beta = 0, the initial value, no encoding. A negative beta hides the
    nearest tokens, so that a head can look only at distant ones. Learned per head and layer: alpha and beta, initially
    0, and with `learned_location` the location mu = 2 sinh(theta), initially 0 tokens. Source: Bianchessi et al. 2025
    (GGD-BAM), with the initial values of the authors' code. There logits and bias are also multiplied by a learned
    multiple of the logarithm of the context's length. Here that is a setting of its own, `temperature.form`, which
    multiplies only queries.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        learned_location: bool = False
        epsilon: Positive = field(default=1e-5, metadata={"alternative": 1.0})  # tokens

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        zeros = jnp.zeros(dims.num_heads, jnp.float32)
        self.epsilon = config.epsilon
        self.alpha, self.beta = nnx.Param(zeros), nnx.Param(zeros)
        self.theta = nnx.Param(zeros) if config.learned_location else None

    def distance_bias(self, distance):
        def of_head(values):
            return jnp.expand_dims(values, tuple(range(1, distance.ndim + 1)))

        location = 0.0 if self.theta is None else of_head(2 * jnp.sinh(self.theta[...]))
        power = (jnp.abs(distance + location) + self.epsilon) ** of_head(self.beta[...])
        return -of_head(jnp.exp(self.alpha[...])) * power.astype(jnp.float32)
