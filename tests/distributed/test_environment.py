"""Environment variables of jax: invalid ones are reported in one line, and the compilation cache obeys them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from posenc_jax.distributed import environment
from posenc_jax.schema import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("JAX_NUM_CPU_DEVICES", value) for value in ("0", "-1", "x", "", "1e3", "1025", "9" * 5000)),
        *(("JAX_DISABLE_JIT", value) for value in ("1", "True", "yes")),
    ],
)
def test_a_variable_that_no_run_can_work_with_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name} = '"):
        environment.check()


@pytest.mark.parametrize(("name", "value"), [("JAX_NUM_CPU_DEVICES", "8"), ("JAX_DISABLE_JIT", "0")])
def test_other_values_are_left_to_jax(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    environment.check()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to\ninitialize. (set JAX_PLATFORMS='')")])
def test_a_platform_without_devices_is_refused_in_one_line(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "CPU")
    with pytest.raises(ConfigError, match=r"^JAX_PLATFORMS = 'CPU': .* (jax finds no device|Unable to initialize)\.$"):
        environment.check_devices()


PROGRAM = """
import pathlib, sys, jax
from posenc_jax.data import cache
cache.keep_compiled_programs(pathlib.Path(sys.argv[1]))
def triple(x):
    return 3 * x
print(jax.config.jax_compilation_cache_dir, float(jax.jit(triple)(2.0)))
"""


def compiled(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a process that compiles one program, or reads it from the cache."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        env={**inherited, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_compiled_program_that_cannot_be_read_is_deleted_and_kept_anew(tmp_path):
    assert compiled(tmp_path).stdout == f"{tmp_path} 6.0\n"
    (program,) = tmp_path.glob("jit_triple-*-cache")
    program.write_bytes(program.read_bytes()[:50])
    (tmp_path / "jit_triples-other-cache").touch()
    assert "jit_triple, could not be read" in compiled(tmp_path).stderr
    assert program.stat().st_size > 50
    assert (tmp_path / "jit_triples-other-cache").exists()
    assert compiled(tmp_path).stderr == ""


def test_compiled_programs_are_kept_where_the_environment_says(tmp_path):
    ran = compiled(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert ran.stdout == f"{tmp_path / 'theirs'} 6.0\n"
    assert list((tmp_path / "theirs").glob("jit_triple-*"))
    assert not (tmp_path / "ours").exists()
