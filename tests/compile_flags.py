"""Compiler flags for the tests: fast compilation, because most programs run once."""

import importlib.metadata
import os

# Like the default flags, these give a loop the same bits as repeated calls of its body.
FAITHFUL = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# With this flag the bits may differ, but compilation takes half the time. Newer releases abort at the unknown flag.
OLDER = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
XLA_FLAGS = f"{FAITHFUL} --xla_cpu_use_fusion_emitters=false" if OLDER else FAITHFUL


def chosen() -> str:
    return FAITHFUL if "COMPARE_BITS" in os.environ else XLA_FLAGS
