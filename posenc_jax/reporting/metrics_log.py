"""metrics.jsonl: one JSON object per line, each with a checksum. Damaged lines are detected and skipped."""

import json
import logging
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from posenc_jax.files import atomic_write_text, place_aside
from posenc_jax.untrusted import MAX_LOG_BYTES, parse_json, read_bytes

logger = logging.getLogger(__name__)

LINE = re.compile(rb'(\{.*), "crc32": ([0-9]{1,10})\}')


class Log(NamedTuple):
    """The intact lines of a log, without checksums, and a description of the lost lines ("" if there are none)."""

    entries: list[dict[str, Any]]
    lost: str


def read_log(path: Path) -> Log:
    """Read all intact lines. A killed process may leave an unfinished last line, which does not count as lost."""
    *lines, rest = read_bytes(path, MAX_LOG_BYTES).split(b"\n")
    if b"}" in rest:  # a complete line whose end is damaged
        lines.append(rest)
    entries = [_entry(line) for line in lines]
    return Log([entry for entry in entries if entry is not None], _lost(path.name, entries))


class MetricsLog:
    """Appends to a log, after removing the lines past `resume_step`.

    The file is copied to `damaged/`, and a new line describes the lost lines, if lines are damaged.

    Attributes:
      last_step: the last step of the log before lines were removed, 0 for a new log.
    """

    def __init__(self, path: Path, resume_step: int):
        log = read_log(path) if path.exists() else Log([], "")
        self.last_step = max((entry["step"] for entry in log.entries), default=0)
        kept = [entry for entry in log.entries if entry["step"] <= resume_step]
        if log.lost:
            aside = place_aside(path, path.with_name("damaged"))
            shutil.copyfile(path, aside)
            logger.warning("%s; %s is as it was", log.lost, aside)
            kept.append({"step": resume_step, "lost": log.lost})
        atomic_write_text(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return f'{text[:-1]}, "crc32": {zlib.crc32(text[:-1].encode())}}}\n'


def _entry(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is damaged."""
    found = LINE.fullmatch(line)
    if found is None or zlib.crc32(found[1]) != int(found[2]):
        return None
    try:
        entry = parse_json(found[1] + b"}")
    except ValueError:
        return None
    return entry if all(_fits(name, value) for name, value in {"step": None, **entry}.items()) else None


def _fits(name: str, value: Any) -> bool:
    """Whether a value is valid for this name: a number, a list with one number per layer or, for "lost", a text."""
    if name in ("step", "tokens"):
        return type(value) is int and value >= 0
    if name == "lost":
        return isinstance(value, str)
    return all(type(number) in (int, float) for number in (value if isinstance(value, list) else [value]))


def _lost(name: str, entries: list[dict[str, Any] | None]) -> str:
    """The number of damaged lines, and the steps between which they are. "" if there are none."""
    steps = ["the start", *(entry and f"step {entry['step']}" for entry in entries), "the end"]
    gaps = [
        f"{steps[i - 1]} and {next(step for step in steps[i:] if step)}"
        for i in range(len(steps))
        if steps[i] is None and steps[i - 1] is not None
    ]
    count = steps.count(None)
    lines = "1 damaged line" if count == 1 else f"{count} damaged lines"
    return f"{name}: {lines} left out, between {'; '.join(gaps)}" if count else ""
