"""Times programs in alternating blocks, so that other load on the machine affects all of them equally."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SETTLE = 0.5  # seconds; threads of the previous program spin for a while before they sleep (OpenMP: 0.2 s)


@dataclass
class Times:
    """Seconds per call in each block: wall-clock time, and CPU time of the process over all cores."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def relative_to(self, other: "Times") -> float:
        """The ratio of this wall-clock time to the other's in the same block; the median over blocks."""
        return statistics.median(own / its for own, its in zip(self.wall, other.wall, strict=True))


def alternate(programs: Mapping[str, Callable[[], object]], *, blocks: int, calls: int) -> dict[str, Times]:
    """Run every program `calls` times in a row, in each of `blocks` blocks. Programs must be compiled before."""
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
    """The CPU seconds that this process has used so far, in all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def load_average() -> float:
    """The mean number of threads that wanted a core in the last minute. Compare it with `os.cpu_count()`."""
    return round(os.getloadavg()[0], 2)
