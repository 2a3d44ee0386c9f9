"""Stopping on SIGINT or SIGTERM, after the same step in all processes of a run."""

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
    """A signal stopped the run after it had saved a checkpoint."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step}, saved; the same command continues from there")
        self.exit_code = 128 + number


class Stop(threading.Event):
    """An event that is set when this process receives a signal, whose number is `number`."""

    number = 0

    def agreed(self, mesh: Mesh) -> Callable[[], int]:
        """A function that returns the number of the signal to stop on, or 0; it is equal in all processes of a mesh.

        It returns the signal that any process had received when `agreed` was called. The devices compute the answer
        after the work that was dispatched before. Reading it later makes no device wait.
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
    """Yield an event that the first SIGINT or SIGTERM sets. A second signal ends the process at once."""
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
