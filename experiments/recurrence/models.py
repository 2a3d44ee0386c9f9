"""Loss and extrapolation of all models of the study, trained alike, in the standard table."""

from collections.abc import Iterable

from experiments.recurrence.study import RECIPES, Study
from posenc_jax.reporting import figures
from posenc_jax.reporting.summary import READING, summary
from posenc_jax.results import write_results

GROUPS = {  # of the figure: title, and what its models are
    "recurrent": lambda name: RECIPES[name].startswith("configs/recurrent"),
    "causal transformers": lambda name: RECIPES[name].startswith(("configs/rope_extrap", "configs/qwen3")),
    "encoders (hidden tokens)": lambda name: RECIPES[name].startswith("configs/bert"),
}


def part(study: Study) -> Iterable[str]:
    yield "## All models, trained alike"
    results = {name: study.results(name) for name in study.models}
    every = [row for rows in results.values() for row in rows]
    write_results(study.output / "results.csv", every)
    yield READING + (
        " Models have 0.83 to 0.89 million parameters and read 2 million tokens at the default size. The encoders "
        "predict hidden tokens from both sides, which is another task, and learn from 15 % of the tokens: compare them "
        "with each other alone. ELMo is read by its forward half."
    )
    yield summary(every, {}).markdown().rstrip()
    groups = {
        title: [row for name, rows in results.items() if belongs(name) for row in rows]
        for title, belongs in GROUPS.items()
    }
    figure = figures.extrapolation_panels({title: rows for title, rows in groups.items() if rows})
    yield study.save(figure, "extrapolation", "Bits per byte over evaluation length")
