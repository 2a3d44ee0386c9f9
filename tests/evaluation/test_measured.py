"""The file of sums comes back as it was written."""

import numpy as np

from posenc_jax.evaluation.measured import Key, Sums, read_measured, write_measured


def test_sums_and_record_come_back(tmp_path):
    nats, counts = np.array([1.5, 0.1, 3e4]), np.array([64.0, 60.0, 2**23])
    measured = {
        Key("none", "prefix", 64): Sums(nats, counts, counts + 1),
        Key("yarn:beta_fast=2,beta_slow=0.0625", "context_gain", 512): Sums(-nats, counts, counts),
        Key("none", "tail", 1024): None,
    }
    record = {"parameters": 12, "config": {"name": "a/b"}}
    documents = ("a.py", "a.py", "caf\udce9.py")
    write_measured(tmp_path / "windows.npz", measured, documents, record)
    found, windows, own = read_measured(tmp_path / "windows.npz")
    assert own == record
    assert windows == documents
    assert list(found) == list(measured)
    assert found[Key("none", "tail", 1024)] is None
    for key in list(measured)[:2]:
        for mine, theirs in zip(found[key], measured[key], strict=True):
            assert mine.dtype == np.float64
            np.testing.assert_array_equal(mine, theirs.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["windows.npz"]
