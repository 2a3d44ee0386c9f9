"""Times of programs that take turns, so that whatever else the machine does falls on all of them alike."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SETTLE = 0.5  # seconds: threads of the program before go on looking for work for a while, as OpenMP's do for 0.2


@dataclass
class Times:
    """Seconds of a call, in each block: by the wall clock, and of the process on all cores."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def relative_to(self, other: "Times") -> float:
        """The median over blocks of the wall-clock time, as a multiple of the other's in the same block."""
        return statistics.median(own / its for own, its in zip(self.wall, other.wall, strict=True))


def alternate(programs: Mapping[str, Callable[[], object]], *, blocks: int, calls: int) -> dict[str, Times]:
    """Let every program run `calls` times in a row, in each of so many blocks; compile them before."""
    times = {name: Times() for name in programs}
    for _ in range(blocks):
        for name, program in programs.items():
            time.sleep(SETTLE)
            begun, used = time.perf_counter(), processor_seconds()
            for _ in range(calls):
                program()
            times[name].wall.append((time.perf_counter() - begun) / calls)
            times[name].processor.append((processor_seconds() - used) / calls)
    return times


def processor_seconds() -> float:
    """What this process has used so far, in all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def load_average() -> float:
    """Programs that wanted a core, in the mean over the last minute: compare with `os.cpu_count()`."""
    return round(os.getloadavg()[0], 2)
