"""Figures of the study of attention and recurrence, as functions from plain arrays to a matplotlib Figure."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from posenc_jax.reporting.figures import STYLE


@matplotlib.rc_context(STYLE)
def logit_terms(terms: Mapping[str, np.ndarray]) -> Figure:
    """A map of each term of the logits [T, T] and, last, of their sum, on one scale of colours."""
    shown = {**terms, "sum": np.sum(list(terms.values()), axis=0)}
    largest = np.quantile(np.abs(list(shown.values())), 0.999)
    figure = Figure(figsize=(9.6, 2.3), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set_title(name)
        axes.set_xlabel("key position")
        axes.grid(visible=False)
    panels[0].set_ylabel("query position")
    figure.colorbar(image, ax=panels, label="logit", shrink=0.8)
    return figure
