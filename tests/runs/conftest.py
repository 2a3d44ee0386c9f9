"""A fixture for tests of runs that do not look at figures."""

from pathlib import Path

import pytest

from posenc_jax.reporting import figures
from posenc_jax.reporting.tensorboard import TensorBoard


@pytest.fixture(scope="module")
def undrawn():
    """Write empty files in place of figures, and no figures to TensorBoard. To draw them takes half the time of a run.

    tests/reporting tests figures, and tests/test_launch.py a run with its figures.
    """

    def save(figure, path):
        for kind in ("png", "svg"):
            Path(f"{path}.{kind}").write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save)
        patch.setattr(TensorBoard, "figure", lambda *_: None)
        yield
