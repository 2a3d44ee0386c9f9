"""The training log: damaged lines are detected and named, and all other lines are kept."""

import json
import re

import pytest

from posenc_jax.reporting.metrics_log import MetricsLog, read_log

ENTRIES = [{"step": step, "loss": 1 / step, "of_layers": [0.5, float("inf")]} for step in (1, 20, 40, 40, 60)]


@pytest.fixture
def path(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 0) as log:
        for entry in ENTRIES:
            log.write(entry)
    return tmp_path / "metrics.jsonl"


def harm(path, *lines):
    """Flip a bit in the middle of some lines."""
    content = path.read_bytes().splitlines(keepends=True)
    for i in lines:
        middle = len(content[i]) // 2
        content[i] = content[i][:middle] + bytes([content[i][middle] ^ 1]) + content[i][middle + 1 :]
    path.write_bytes(b"".join(content))


def test_lines_come_back_and_are_json(path):
    assert read_log(path) == (ENTRIES, "")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 20, 40, 40, 60]


def test_no_flipped_bit_goes_unnoticed_and_no_other_line_is_lost(path):
    content = path.read_bytes()
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        entries, lost = read_log(path)
        assert lost, (i, bytes(flipped))
        assert all(entry in ENTRIES for entry in entries)
        assert len(entries) >= len(ENTRIES) - 2  # a flipped newline joins two lines


@pytest.mark.parametrize(
    ("lines", "lost"),
    [
        ([1], "metrics.jsonl: 1 damaged line left out, between step 1 and step 40"),
        ([3], "metrics.jsonl: 1 damaged line left out, between step 40 and step 60"),
        ([0, 2, 3], "metrics.jsonl: 3 damaged lines left out, between the start and step 20; step 20 and step 60"),
        ([3, 4], "metrics.jsonl: 2 damaged lines left out, between step 40 and the end"),
        (range(5), "metrics.jsonl: 5 damaged lines left out, between the start and the end"),
    ],
)
def test_damaged_lines_are_counted_and_their_place_is_named(path, lines, lost):
    harm(path, *lines)
    assert read_log(path) == ([entry for i, entry in enumerate(ENTRIES) if i not in lines], lost)


def test_a_line_that_a_killed_process_did_not_end_is_no_damage(path):
    content = path.read_bytes()
    for end in range(len(content) - len(content.splitlines()[-1]), len(content) - 2):
        path.write_bytes(content[:end])
        assert read_log(path) == (ENTRIES[:-1], "")
    path.write_bytes(content[:-1])  # without the newline
    assert read_log(path) == (ENTRIES, "")


def test_a_run_that_goes_on_keeps_the_lines_before_and_after_a_damaged_one_and_says_so(path, caplog):
    harm(path, 1)
    damaged = path.read_bytes()
    with MetricsLog(path, 40) as log:
        log.write({"step": 50})
    lost = "metrics.jsonl: 1 damaged line left out, between step 1 and step 40"
    entries = [ENTRIES[0], *ENTRIES[2:4], {"step": 40, "lost": lost}, {"step": 50}]
    assert read_log(path) == (entries, "")
    (aside,) = (path.parent / "damaged").iterdir()
    assert aside.read_bytes() == damaged
    assert re.fullmatch(r"metrics.jsonl-\d+", aside.name)
    assert [record.getMessage() for record in caplog.records] == [f"{lost}; {aside} is as it was"]
