"""How the C library hands out memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc reuse what is freed; does nothing elsewhere. Call it before the first use of a device.

    XLA on CPU asks for the working memory of a step anew in each step, and glibc by default gives such large blocks
    back to the system, which then clears every page again: about a fifth of a step's processor time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries of Linux have none
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
            mallopt(option, value)
