"""Eight host devices for every test, programs compiled in haste, and shape annotations checked as they run."""

import os

from tests import haste

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {haste.XLA_FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook finds it as an attribute of its package)

install_import_hook("posenc_jax", "tests.typechecker.check")
