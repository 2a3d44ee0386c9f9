"""Runs on documents that are all shorter than a window."""

import jax
import numpy as np

from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.runs.program import Program
from tests.runs import tiny_runs
from tests.runs.tiny_runs import ONE, alone, stacked, tiny


def short_documents():
    """The alphabet, again and again, in documents of 2 to 13 tokens."""
    sizes = np.random.default_rng(0).integers(2, 14, 300)
    ends = np.cumsum([0, *sizes])
    letters = np.concatenate([97 + np.arange(size) for size in sizes]).astype(np.uint8)
    names = tuple(map(str, range(len(sizes))))
    splits = {name: Split(name, letters, ends, names, len(letters)) for name in ("train", "validation", "test")}
    return Dataset("letters", "0", ByteTokenizer(), splits)


def test_a_run_learns_from_short_documents_alone_or_in_a_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_runs, "text", short_documents)
    evaluation = {"evaluation__lengths": (8,), "evaluation__tail": 4, "optimizer__learning_rate": 0.03}
    runs = [tiny(data__packing="documents", seed=seed, **evaluation) for seed in (0, 1)]
    Program(runs[0], short_documents(), ONE).trace()
    state, log = alone(runs[0], tmp_path / "alone")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 7
    assert losses[-1] < losses[0] - 0.5
    assert [line["validation_loss"] for line in log if "validation_loss" in line][-1] < losses[0]
    assert [line["tokens"] for line in log if "tokens" in line][-1] == 7 * 8 * 16
    (of_stack, _), _ = stacked(runs, tmp_path / "stack", jax.devices()[:2], vectorized=True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), of_stack, state)
