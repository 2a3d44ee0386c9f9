"""How training is stopped by a signal: after the step it is at, in all processes of a run after the same one."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Stopped(Exception):
    """A signal asked the run to stop, which it did after saving."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step}, saved; the same command continues from there")
        self.exit_code = 128 + number


class Stop(threading.Event):
    """Set once a signal has asked this process to stop, by its `number`."""

    number = 0

    def agreed(self, mesh: Mesh) -> Callable[[], int]:
        """A function that gives the signal to stop by, or 0: in all processes of a mesh the same, if any has got one.

        Of many processes it gives what they had got when this was called. The answer is computed by the devices, where
        it is ready when what they were given before is: read it then, and no device waits for it.
        """
        if not mesh.is_multi_process:
            return lambda: self.number
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        own = jax.make_array_from_callback((mesh.size,), everywhere, lambda _: np.full(1, self.number, np.int32))
        largest = _largest(mesh)(own)
        return lambda: int(largest)


@functools.cache
def _largest(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """What the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.number = number
        stop.set()

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
