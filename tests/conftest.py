"""Eight host devices for every test, programs compiled in haste, and shape annotations checked as they run."""

import itertools
import os
from pathlib import Path

from tests import haste

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {haste.chosen()}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook finds it as an attribute of its package)

install_import_hook("posenc_jax", "tests.typechecker.check")

MAPS, TESTS = Path("/proc/self/maps"), itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Let go of compiled programs in time: Linux allows a process 65,530 memory maps, of which each takes several."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Text to train on, and where its tokens are kept."""
    from tests.small import write_text  # imports posenc_jax, so only after the hook

    return write_text(tmp_path_factory.mktemp("data"))
