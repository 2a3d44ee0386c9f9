"""All commands print errors as one line, write to any terminal, and refuse numbers out of range."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attention
from experiments import longrope_search
from posenc_jax import catalogue, command
from posenc_jax.schema import ConfigError

ROOT = Path(__file__).parent.parent
COMMANDS = [
    path
    for folder in ("benchmarks", "experiments", "posenc_jax", ".")
    for path in sorted(ROOT.glob("*.py" if folder == "." else f"{folder}/**/*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_begins_alike_and_bounds_its_numbers(path):
    source = path.read_text(encoding="utf-8")
    if path.name not in ("noxfile.py", "readme.py"):  # these write nothing
        assert "    command.run(main" in source
    if "walkthrough" not in path.parts:  # the walkthrough checks its settings together
        assert not re.search(r"type=(int|float)\b", source)


def of_few_letters(monkeypatch) -> io.BytesIO:
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "ascii", write_through=True))
    return written


def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch):
    written = of_few_letters(monkeypatch)
    command.make_output_writable()
    print("0.123 ± 0.004")
    print("나는", file=sys.stderr)
    assert written.getvalue() == b"0.123 ? 0.004\n??\n"


def test_encodings_are_listed_on_a_terminal_of_few_letters(monkeypatch):
    written = of_few_letters(monkeypatch)
    with pytest.raises(SystemExit, match="0"):
        command.run(catalogue.main, [])
    assert b"rope" in written.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["posenc_jax.encodings"],
        ["posenc_jax.walkthrough", "a b"],
        ["experiments.longrope_search", "runs"],
        ["benchmarks"],
    ],
)
def test_a_variable_that_jax_would_fail_on_ends_a_command_with_2_and_one_line(words):
    variables = os.environ | {"JAX_NUM_CPU_DEVICES": "x"}
    ran = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=variables, capture_output=True, text=True)
    expected = "error: JAX_NUM_CPU_DEVICES = 'x': must be an integer from 1 to 1024, or not be set.\n"
    assert (ran.returncode, ran.stderr) == (2, expected)


def test_an_error_of_jax_for_a_platform_without_devices_is_one_line(monkeypatch, capsys):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no such plugin (set JAX_PLATFORMS='' to choose)")

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit, match="2"):
        command.run(devices)
    assert capsys.readouterr().err.startswith("error: JAX_PLATFORMS = 'cuda': must name platforms with devices")


def test_an_error_that_is_not_for_the_user_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="defect"):
        command.run(lambda: (_ for _ in ()).throw(RuntimeError("defect")))


@pytest.mark.parametrize("lines", [1, 10_000])  # written at the end, or before
def test_a_command_whose_reader_has_ended_ends_quietly(lines):
    code = f"from posenc_jax import command; command.run(lambda: print(*['words'] * {lines}, sep='\\n'))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as ran:
        ran.stdout.close()
        assert (ran.stderr.read(), ran.wait()) == (b"", 141)


def test_an_error_with_an_exit_code_is_one_line(capsys):
    def main():
        raise ConfigError("--field", 3, "must be 4")

    with pytest.raises(SystemExit, match="2"):
        command.run(main)
    assert capsys.readouterr().err == "error: --field = 3: must be 4.\n"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (longrope_search.main, ["runs/none", "--length=-1"]),
        (longrope_search.main, ["runs/none", "--length=1"]),
        (longrope_search.main, ["runs/none", "--windows=0"]),
        (longrope_search.main, ["runs/none", "--windows=-3"]),
        (longrope_search.main, ["runs/none", "--population=0"]),
        (longrope_search.main, ["runs/none", "--iterations=-1"]),
        (longrope_search.main, ["runs/none", "--critical_pair=-1"]),
        (longrope_search.main, ["runs/none", "--iterations=2000000000"]),
        (attention.main, ["--lengths=-128"]),
        (attention.main, ["--repeats=0"]),
        (attention.main, ["--heads=many"]),
        (attention.main, ["--dtype=float3"]),
    ],
)
def test_a_number_out_of_bounds_is_refused(main, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"command: error: argument {arguments[-1].partition('=')[0]}: ")
