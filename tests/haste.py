"""How programs are compiled for the tests: in haste, as most run once."""

import importlib.metadata
import os

# Rounds as the default does, in that a loop gives the bits of its body called as often.
FAITHFUL = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Does not, in half the time; newer releases end the process at a flag that they do not know.
OLDER = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
XLA_FLAGS = f"{FAITHFUL} --xla_cpu_use_fusion_emitters=false" if OLDER else FAITHFUL


def chosen() -> str:
    return FAITHFUL if "COMPARE_BITS" in os.environ else XLA_FLAGS
