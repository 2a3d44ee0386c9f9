"""Add or rotate: what logits hold where positions are added to embeddings, beside them, or turn queries and keys."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.recurrence import addition_measures
from experiments.recurrence.study import Study, table, test_windows
from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.reporting import comparison

SHIFT = 1000  # tokens


def part(study: Study) -> Iterable[str]:
    yield "## Add or rotate"
    dims = Dims(d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, max_length=256)
    sinusoidal, rope = (encodings.build(name, dims, nnx.Rngs(0)) for name in ("sinusoidal", "rope"))
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (128, dims.d_model))
    own, other = (
        addition_measures.Projections(*(jax.random.normal(key, (128, 2, 64)) / np.sqrt(128) for key in pair))
        for pair in (keys[1:3], keys[3:5])
    )
    identity = addition_measures.Projections(*[jnp.eye(128).reshape(128, 2, 64)] * 2)
    places = jnp.arange(128)

    def terms(positions, kernels=own, of_positions=None):
        p = addition_measures.positional_embeddings(sinusoidal, positions, dims.d_model)
        return addition_measures.addition_terms(x, p, kernels, of_positions)

    arms: dict[str, Callable] = {
        "added, before the projections": lambda positions: terms(positions),
        "beside the embedding (concatenated)": lambda positions: terms(positions, own, other),
        "added, projections the identity": lambda positions: terms(positions, identity),
        "rotating queries and keys (RoPE)": lambda positions: addition_measures.rotated_logits(x, positions, own, rope)[
            None
        ],
    }
    if "sinusoidal" in study.models:
        added, text = model_and_text(study, "sinusoidal")
        arms["added, first layer of the trained model"] = lambda positions: addition_measures.first_layer_terms(
            added, text, positions
        )
    if "rope" in study.models:
        turned, text = model_and_text(study, "rope")
        arms["RoPE, first layer of the trained model"] = lambda positions: addition_measures.first_layer_logits(
            turned, text, positions
        )[None]
    yield (
        "Logits between 128 tokens with random embeddings and projections (and in models that were trained), as sums "
        "of terms, each as its root mean square relative to that of the sum; and how much the logits, and the term of "
        f"positions alone, change when all positions are {SHIFT:,} further on: 0 where they depend on distance alone."
    )
    rows = []
    for name, logits in arms.items():
        here, there = logits(places), logits(places + SHIFT)
        total, moved = here.sum(axis=0), there.sum(axis=0)
        shares = [f"{np.sqrt((term**2).mean() / (total**2).mean()):.2f}" for term in here] if len(here) > 1 else ["1"]
        shares += [""] * (4 - len(shares))
        alone = f"{addition_measures.relative_change(here[3], there[3]):.2g}" if len(here) > 1 else ""
        rows.append((name, *shares, f"{addition_measures.relative_change(total, moved):.2g}", alone))
    yield table(("positions", *addition_measures.TERMS, "change of logits", "of position-position"), rows)
    yield (
        "Addition is the case of concatenation whose two projections are equal, so it has the same four terms; three "
        "of them tie the content of a token, or a position, to absolute positions. The product of two positions is a "
        "function of distance where the projections are the identity, and not in general. A rotation keeps the product "
        "of contents, turned by the distance: shifting everything changes nothing but rounding."
    )
    if "sinusoidal" in study.models:
        figure = comparison.logit_terms(
            dict(
                zip(
                    addition_measures.TERMS, addition_measures.first_layer_terms(added, text, places)[:, 0], strict=True
                )
            )
        )
        yield study.save(figure, "addition_terms", "The four terms of the first layer's logits, trained model")


def model_and_text(study: Study, name: str) -> tuple[LanguageModel, jax.Array]:
    """A trained model, and the first 128 tokens of the text it is evaluated on."""
    run = study.trained(name)
    return run.model, jnp.asarray(test_windows(run.config, 128, 1)[0, :128])
