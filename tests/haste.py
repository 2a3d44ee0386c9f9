"""How programs are compiled for the tests: in haste, as most run once."""

import os

# Rounds as the default does, in that a loop gives the bits of its body called as often.
FAITHFUL = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
XLA_FLAGS = f"{FAITHFUL} --xla_cpu_use_fusion_emitters=false"  # does not, in half the time


def chosen() -> str:
    return FAITHFUL if "COMPARE_BITS" in os.environ else XLA_FLAGS
