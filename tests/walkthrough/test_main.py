"""The command: its printed output, its files, and the errors for invalid arguments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough import fonts, pictures, trace
from posenc_jax.walkthrough.command import main
from tests.walkthrough.conftest import PIECES, SENTENCE, run
from tests.walkthrough.test_fonts import needs_korean

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--vocab-size", "64", "--width", "32", "--heads", "2")


def test_the_trace_is_plain_text_in_english(english):
    assert "How a transformer knows the token order of “나는 사과를 좋아해”" in english.printed
    assert "one-hot (5, 30522) @ W (30522, 512) = (5, 512)" in english.printed
    assert "Common misconception" in english.printed
    assert "\x1b" not in english.printed
    assert not re.search(r" $", english.printed, re.MULTILINE)
    assert english.printed.endswith(f"{english.folder / 'index.html'}\n")


def test_nothing_is_warned_of_where_a_font_has_the_sentence(english, korean):
    needs_korean()
    assert english.warned == korean.warned == ""


def test_the_trace_is_korean_when_asked(korean):
    assert "흔히 잘못 설명되는 점" in korean.printed
    assert "Common misconception" not in korean.printed


def test_lines_fit_the_terminal(english):
    fold = [line for line in english.printed.splitlines()[:-1] if len(line) > 80]
    assert fold == []
    assert "…" not in english.printed  # no column was truncated


def test_all_lines_of_a_misconception_are_indented(english):
    told = english.printed.split("! Common misconception")[3].split("\n\n")[0]
    assert len(told.splitlines()) > 3
    assert all(re.match(r"  \S", line) for line in told.splitlines()[1:])


def test_only_the_files_of_the_walkthrough_are_left(english):
    names = {f"{name}.{kind}" for name in pictures.PICTURES for kind in ("png", "svg")}
    assert {path.name for path in english.folder.iterdir()} == names | {"rotation.gif", "index.html"}


def test_without_a_folder_the_output_goes_to_walkthrough(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "draw", lambda followed, folder, language: fonts.Lettering(()))
    monkeypatch.setattr("posenc_jax.walkthrough.command.page", lambda *_: "page")
    main(["a b", *SMALL])
    assert (tmp_path / "walkthrough" / "index.html").read_text() == "page"
    capsys.readouterr()


@pytest.fixture
def followed_with(monkeypatch, tmp_path):
    """The tokens and settings that `main` passes to `trace.follow` for these arguments."""

    def follow(*arguments):
        seen = []

        def stop(*given):
            seen.extend(given)
            raise InterruptedError

        monkeypatch.setattr(trace, "follow", stop)
        with pytest.raises(InterruptedError):
            main([*arguments, "--output", str(tmp_path / "out")])
        return seen

    return follow


def test_options_reach_the_trace(followed_with, tmp_path):
    weights = ("--width", "64", "--heads", "4", "--seed", "3")
    given, settings = followed_with(SENTENCE, "--tokens", " ".join(PIECES), *weights)
    assert given.pieces == PIECES
    assert given.vocab_size == 30522
    assert settings == trace.Settings(width=64, heads=4, seed=3)
    given, settings = followed_with("ab", "--tokenizer", "bytes", "--positions", "learned", "--table-length", "9")
    assert (given.pieces, given.vocab_size) == (("61", "62"), 256)
    assert settings == trace.Settings(positions="learned", table_length=9)
    (tmp_path / "corpus.txt").write_text("ab ab", encoding="utf-8")
    given, _ = followed_with("ab", "--corpus", str(tmp_path / "corpus.txt"), "--vocab-size", "99")
    assert (given.pieces, given.vocab_size) == (("ab",), 99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "sentence = '': must not be empty"),
        ([], "sentence = '': must be given, unless --tokens is given"),
        (["x" * 100_000], "must have at most 2,000 characters, and has 100,000"),
        (["a b", "--width", "511"], "--width = 511: must be even"),
        (
            ["나", "--tokens", "나", "나", "--positions", "learned", "--table-length", "1"],
            "--tokens = '나 나': must spell the sentence",
        ),
        (
            ["a b c", "--positions", "learned", "--table-length", "2"],
            "--table-length = 2: must be at least 3, the number of tokens: position 2 is beyond the learned table",
        ),
        (["a", "--table-length", "9"], "--table-length = 9: has no effect without --positions learned"),
        (
            ["a", "--tokens", "a", "--tokenizer", "bytes"],
            "= 'bytes': has no effect together with --tokens",
        ),
        (["a", "--tokenizer", "bytes", "--corpus", "f"], "--corpus = 'f': has no effect with --tokenizer bytes"),
        (["a b", "--model", "m", "--tokens", "a b"], "--tokens = 'a b': has no effect together with --model"),
        (["a b", "--model", "m", "--vocab-size", "9"], "--vocab-size = '9': has no effect together with --model"),
        (["--model", "m"], "sentence = '': must be given together with --model"),
        (["a b", "--model", "m"], "--model = 'm': must be a workdir, a Hugging Face folder, a .gguf file or 'smollm2'"),
        (["a", "--vocab-size", "0"], "--vocab-size = 0: must be at least 1"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_help_of_an_option_is_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "rows of the embedding matrix; default: 30,522, or 256 with --tokenizer bytes" in shown
    assert "or smollm2; its tokenizer is used" in shown


def test_an_output_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created as a folder"):
        main(["a b", *SMALL, "--output", str(tmp_path / "file")])


def test_errors_end_the_command_with_2():
    command = [sys.executable, "-m", "posenc_jax.walkthrough", "a", "--width", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --width = 7: must be even, because each pair of channels is a sine and a cosine.\n"


def test_a_sentence_that_no_font_can_draw_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "_families", lambda: [fonts.DEFAULT])
    monkeypatch.setattr(fonts, "_find_new_fonts", lambda: None)
    monkeypatch.setattr(pictures, "PICTURES", {"sum": pictures.added})
    monkeypatch.setattr(pictures.rotation, "animate", lambda *_: None)
    monkeypatch.setattr("posenc_jax.walkthrough.command.page", lambda *_: "page")
    made = run(tmp_path / "out", SENTENCE, *SMALL, "--language", "ko")
    assert made.warned.startswith("warning: no usable installed font has ")
    assert "fonts-noto-cjk" in made.warned
    assert "흔히 잘못 설명되는 점" in made.printed
