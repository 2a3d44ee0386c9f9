"""Gives all tests eight host devices, fast compilation, and shape annotations that are checked at run time."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

from tests import compile_flags

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {compile_flags.chosen()}"
os.environ["JAX_PLATFORMS"] = "cpu"
# All processes of one pytest run, including those that tests start, share compiled programs. Two runs share none.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="posenc_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook finds it as an attribute of its package)

install_import_hook("posenc_jax", "tests.typechecker.check")

MAPS, TESTS = Path("/proc/self/maps"), itertools.count(1)


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def few_programs():
    """Free compiled programs in time: each needs several memory maps, and Linux allows a process only 65,530."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with text to train on, and the cache of its tokens."""
    from tests.small import write_text  # imports posenc_jax, which must happen after the hook

    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The cache folder of started processes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def whole(cache, tmp_path_factory):
    """The workdir of an uninterrupted run of the command, with its figures."""
    from tests.test_launch import BRIEF, launch

    workdir = tmp_path_factory.mktemp("whole") / "run"
    ran = launch(cache, *BRIEF, f"--workdir={workdir}")
    assert ran.returncode == 0, ran.stderr
    assert "ntk" in ran.stdout
    assert ran.stderr == ""
    return workdir
