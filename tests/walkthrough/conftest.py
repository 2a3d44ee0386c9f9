"""Fixtures: the command is run once in English with defaults, and once in Korean, for all tests of its output."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from posenc_jax.walkthrough import rotation, tokens, trace
from posenc_jax.walkthrough.command import main

SENTENCE = "나는 사과를 좋아해"
PIECES = ("나", "##는", "사과", "##를", "##좋아해")


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str
    warned: str

    @property
    def page(self) -> str:
        return (self.folder / "index.html").read_text(encoding="utf-8")


def run(folder: Path, *arguments: str) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as warned:
        main([*arguments, "--output", str(folder)])
    return Run(folder, printed.getvalue(), warned.getvalue())


@pytest.fixture(scope="session")
def english(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("english"), SENTENCE, "--tokens", *PIECES)


@pytest.fixture(scope="session")
def korean(tmp_path_factory) -> Run:
    """Its animation has two frames, because a whole one takes longer to draw than all pictures."""
    small = ("--vocab-size", "64", "--width", "32", "--heads", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "TOKENS", 1)
        patch.setattr(rotation, "FRAMES_PER_TOKEN", 2)
        return run(tmp_path_factory.mktemp("korean"), SENTENCE, "--tokens", *PIECES, "--language", "ko", *small)


@pytest.fixture(scope="session")
def followed() -> trace.Trace:
    return trace.follow(tokens.given(PIECES, SENTENCE))
