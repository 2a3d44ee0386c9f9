"""Runs the tests marked `bits` in a separate process with the compiler flags that they need."""

import os
import subprocess
import sys

from tests.test_launch import ROOT


def test_what_is_to_change_no_bit_changes_none():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "bits", "tests/runs"]
    environment = {**os.environ, "COMPARE_BITS": "yes"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout
    assert "7 passed" in ran.stdout
