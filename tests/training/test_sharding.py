"""The CPU as several devices."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
import jax
from posenc_jax.training.sharding import divide_cpu
os.cpu_count = lambda: {cores}
divide_cpu({parts}, {rows})
print(len(jax.devices()))
"""


@pytest.mark.parametrize(
    ("cores", "parts", "rows", "environment", "expected"),
    [
        (4, 2, 16, {}, 2),
        (1, 2, 16, {}, 1),
        (4, 3, 16, {}, 2),
        (4, 2, 5, {}, 1),
        (4, 2, 16, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        (4, 2, 16, {"JAX_NUM_CPU_DEVICES": "1"}, 1),
    ],
)
def test_the_cpu_is_divided_as_far_as_cores_and_rows_allow(cores, parts, rows, environment, expected):
    program = PROGRAM.format(cores=cores, parts=parts, rows=rows)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == expected
