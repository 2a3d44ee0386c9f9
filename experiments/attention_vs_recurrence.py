"""Attention beside the recurrence that it replaced: what it costs, what it remembers, and why it needs positions.

    python -m experiments.attention_vs_recurrence                     all five parts
    python -m experiments.attention_vs_recurrence order addition      some of them
    python -m experiments.attention_vs_recurrence table --models rope lstm encoder_none

- costs: time and memory of a training step and of inference, against the length;
- memory: how far back a loss reaches, before and after training, and recall of a key at a distance;
- order: what a model without positions can know of the order of words;
- addition: positions added to embeddings, beside them, or rotating queries and keys;
- table: loss and extrapolation of all models, at equal parameters and tokens.

Parts but the first train the models that they need, each a run of its recipe in a folder of --runs; the same command
goes on after an interruption. Each part writes its section and figures to --output, and report.md is all sections.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import rope_extrap
from experiments.encoding_table import READING, run_recipe, summary
from posenc_jax import encodings, trained
from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.data import tokens as data
from posenc_jax.encodings.base import Dims
from posenc_jax.evaluation import addition, order
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.reporting import comparison, figures
from posenc_jax.reporting.tables import Cell, Result, Table, write_results
from posenc_jax.schema import ConfigError
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state

RECIPES = {  # name: recipe
    "rnn": "configs/recurrent.py:cell=rnn",
    "lstm": "configs/recurrent.py:cell=lstm",
    "gru": "configs/recurrent.py:cell=gru",
    "elmo": "configs/recurrent.py:cell=elmo",
    "none": "configs/rope_extrap.py:encoding=none",
    "sinusoidal": "configs/rope_extrap.py:encoding=sinusoidal",
    "rope": "configs/rope_extrap.py:encoding=rope",
    "alibi": "configs/rope_extrap.py:encoding=alibi",
    "fox": "configs/rope_extrap.py:encoding=fox",
    "qwen3": "configs/qwen3.py",
    "encoder_none": "configs/bert.py:tokens=bytes,positions=none",
    "encoder_learned": "configs/bert.py:tokens=bytes,positions=learned",
    "encoder_sinusoidal": "configs/bert.py:tokens=bytes,positions=sinusoidal",
    "encoder_rope": "configs/bert.py:tokens=bytes,positions=rope",
}
GROUPS = {  # of the figure: title, and what its models are
    "recurrent": lambda name: RECIPES[name].startswith("configs/recurrent"),
    "causal transformers": lambda name: RECIPES[name].startswith(("configs/rope_extrap", "configs/qwen3")),
    "encoders (hidden tokens)": lambda name: RECIPES[name].startswith("configs/bert"),
}
SENTENCE = b" I love you so much"
SHIFT = 1000  # tokens


@dataclasses.dataclass(frozen=True)
class Study:
    """What a part works with."""

    models: Sequence[str]
    size: str
    runs: Path
    output: Path

    def results(self, name: str) -> list[Result]:
        """Results of a model's run, named as the study names it; trains it if need be."""
        recipe = RECIPES[name] + ("," if ":" in RECIPES[name] else ":") + f"size={self.size}"
        rows = run_recipe(recipe, self.runs / name)
        return [dataclasses.replace(row, run="attention_vs_recurrence", encoding=name) for row in rows]

    def trained(self, name: str) -> trained.Trained:
        self.results(name)
        return trained.load(self.runs / name)

    def save(self, figure, name: str, caption: str) -> str:
        """Write a figure; returns the Markdown that shows it."""
        (self.output / "figures").mkdir(parents=True, exist_ok=True)
        figures.save(figure, self.output / "figures" / name)
        return f"![{caption}](figures/{name}.png)\n\n*{caption}*"


def order_part(study: Study) -> Iterable[str]:
    yield "## Order blindness"
    yield (
        f'The words of "{SENTENCE.decode().strip()}" in all 120 orders. *Change*: the root mean square of the '
        "difference between what represents each token after reordering and what represented it before, relative to "
        "the latter, mean over orders (and largest). 0 means that the model cannot tell the orders apart."
    )
    tokens, orders = jnp.asarray(np.frombuffer(SENTENCE, np.uint8), jnp.int32), order.word_orders(SENTENCE)[1:]
    rows = []
    for name in study.models:
        run = study.trained(name)
        cells = []
        for model in (untrained(run), run.model):
            change = order.reordering_change(model, tokens, orders)
            cells.append(f"{change.mean():.2g} ({change.max():.2g})")
        rows.append((name, *cells))
    yield table(("model", "at initialisation", "after training"), rows)
    yield (
        "An encoder without positions gives every token the same representation wherever it stands, to rounding: "
        "attention sums over a set. A causal decoder without positions does not, since token i sees i tokens: the "
        "mask itself tells order. But one layer tells only which tokens came before, not how they stood; from the "
        "second on, states of earlier tokens, which differ by what each of them saw, carry their order on. Change "
        "of the last word's representation under the 24 orders of the four words before it:"
    )
    earlier = order.word_orders(SENTENCE[: SENTENCE.rindex(b" ")])[1:]
    rows = []
    for layers in (1, 2, 4):
        model = shallow(study, layers)
        rows.append(
            (f"causal decoder without positions, {layers} layers, untrained", last_change(model, tokens, earlier))
        )
    for name in ("none", "encoder_none"):
        if name in study.models:
            rows.append((f"{name}, trained", last_change(study.trained(name).model, tokens, earlier)))
    yield table(("model", "change of the last word's representation"), rows)
    losses = {name: study.results(name) for name in study.models if name.startswith("encoder")}
    if losses:
        yield "Loss on hidden tokens after the same training, bits per byte at the training length:"
        yield table(
            ("model", "prefix"),
            [(name, f"{prefix(rows, rows[0].train_length):.3f}") for name, rows in losses.items()],
        )


def addition_part(study: Study) -> Iterable[str]:
    yield "## Add or rotate"
    dims = Dims(d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, max_length=256)
    sinusoidal, rope = (encodings.build(name, dims, nnx.Rngs(0)) for name in ("sinusoidal", "rope"))
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (128, dims.d_model))
    own, other = (
        addition.Projections(*(jax.random.normal(key, (128, 2, 64)) / np.sqrt(128) for key in pair))
        for pair in (keys[1:3], keys[3:5])
    )
    identity = addition.Projections(*[jnp.eye(128).reshape(128, 2, 64)] * 2)
    places = jnp.arange(128)

    def terms(positions, kernels=own, of_positions=None):
        p = addition.positional_embeddings(sinusoidal, positions, dims.d_model)
        return addition.addition_terms(x, p, kernels, of_positions)

    arms: dict[str, Callable] = {
        "added, before the projections": lambda positions: terms(positions),
        "beside the embedding (concatenated)": lambda positions: terms(positions, own, other),
        "added, projections the identity": lambda positions: terms(positions, identity),
        "rotating queries and keys (RoPE)": lambda positions: addition.rotated_logits(x, positions, own, rope)[None],
    }
    if "sinusoidal" in study.models:
        added, text = study.trained("sinusoidal").model, read_text(study)
        arms["added, first layer of the trained model"] = lambda positions: addition.first_layer_terms(
            added, text, positions
        )
    if "rope" in study.models:
        turned, text = study.trained("rope").model, read_text(study)
        arms["RoPE, first layer of the trained model"] = lambda positions: addition.first_layer_logits(
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
        alone = f"{addition.relative_change(here[3], there[3]):.2g}" if len(here) > 1 else ""
        rows.append((name, *shares, f"{addition.relative_change(total, moved):.2g}", alone))
    yield table(("positions", *addition.TERMS, "change of logits", "of position-position"), rows)
    yield (
        "Addition is the case of concatenation whose two projections are equal, so it has the same four terms; three "
        "of them tie the content of a token, or a position, to absolute positions. The product of two positions is a "
        "function of distance only where the projections are the identity. A rotation keeps the product of contents, "
        "turned by the distance: shifting everything changes nothing but rounding."
    )
    if "sinusoidal" in study.models:
        figure = comparison.logit_terms(
            dict(zip(addition.TERMS, addition.first_layer_terms(added, text, places)[:, 0], strict=True))
        )
        yield study.save(figure, "addition_terms", "The four terms of the first layer's logits, trained model")


def table_part(study: Study) -> Iterable[str]:
    yield "## All models, trained alike"
    results = {name: study.results(name) for name in study.models}
    every = [row for rows in results.values() for row in rows]
    write_results(study.output / "results.csv", every)
    yield READING.split(" Parameters")[0] + (
        " Models have 0.83 to 0.89 million parameters and read 2 million tokens at the default size. The encoders "
        "predict hidden tokens from both sides, an easier task: compare them with each other alone."
    )
    yield summary(every, {}).markdown().rstrip()
    groups = {
        title: [row for name, rows in results.items() if belongs(name) for row in rows]
        for title, belongs in GROUPS.items()
    }
    figure = figures.extrapolation_panels({title: rows for title, rows in groups.items() if rows})
    yield study.save(figure, "extrapolation", "Bits per byte over evaluation length")


PARTS = {"order": order_part, "addition": addition_part, "table": table_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="default: all")
    parser.add_argument("--models", nargs="+", default=list(RECIPES), help="default: all")
    parser.add_argument("--size", default="default", choices=("default", "smoke"))
    parser.add_argument("--runs", type=Path, default=Path("runs/attention_vs_recurrence"))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/attention_vs_recurrence"))
    args = parser.parse_args()
    try:
        for field, names, known in (("part", args.parts, PARTS), ("--models", args.models, RECIPES)):
            for name in names:
                if name not in known:
                    raise ConfigError(field, name, "must be one of: " + ", ".join(known), known)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    study = Study(args.models, args.size, args.runs, args.output)
    sections = study.output / "sections"
    sections.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        (sections / f"{part}.md").write_text("\n\n".join(PARTS[part](study)) + "\n", encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for part in PARTS if (path := sections / f"{part}.md").exists()]
    report = study.output / "report.md"
    report.write_text("\n".join(["# Attention and the recurrence before it\n", *texts]), encoding="utf-8")
    print(f"report: {report}")


def untrained(run: trained.Trained) -> LanguageModel:
    """The model of a run as it was before its first step."""
    state = initial_state(run.config, optimizers.build(run.config.optimizer, total_steps=1, warmup_steps=0))
    return nnx.merge(run.graphdef, state["params"], state["constants"])


def shallow(study: Study, layers: int) -> LanguageModel:
    """A causal decoder without positions, of so many layers, before training."""
    recipe = rope_extrap.get_config(f"size={study.size},encoding=none")
    recipe.model.num_layers = layers
    config = RunConfig.from_mapping(recipe.to_dict())
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    return nnx.merge(abstract_model(config)[0], state["params"], state["constants"])


def last_change(model: LanguageModel, tokens: jax.Array, earlier: np.ndarray) -> str:
    """Mean and largest change of the last word's last byte under orders of the words before it."""
    change = order.last_state_change(model, tokens, earlier)
    return f"{change.mean():.2g} ({change.max():.2g})"


def read_text(study: Study, length: int = 128) -> jax.Array:
    """The first tokens of the first evaluation window."""
    config = trained.read_config(study.runs / study.models[0])
    dataset = data.prepare(config.data)
    windows = pipeline.evaluation_windows(dataset.splits["test"], length=length, count=1)
    return jnp.asarray(windows.tokens[0, :length])


def prefix(rows: Iterable[Result], length: int) -> float:
    """Bits per byte over windows of this length."""
    (value,) = (row.value for row in rows if (row.metric, row.eval_length) == ("prefix_bits_per_byte", length))
    assert value is not None
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return Table("", tuple(header), tuple(tuple(map(Cell, row)) for row in rows)).markdown().rstrip()


if __name__ == "__main__":
    main()
