"""Members: runs that differ in nothing but what their arrays hold, trained together by one compiled program.

A device takes its members one after another (`jax.lax.map`, the default on a CPU) or at once (`jax.vmap`, the default
on accelerators), and sends other devices nothing. Where there are more devices than members, or the settings divide a
model, several devices share each member, at once, as they share a run. One after another on one device, each member is
bit for bit what its run is alone on one device; at once, or on several devices, for which XLA arranges its sums anew,
it is so to rounding.
"""

import functools
import itertools
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from posenc_jax.config import RunConfig, flat
from posenc_jax.data import pipeline
from posenc_jax.data.tokens import Dataset
from posenc_jax.schema import plain
from posenc_jax.training import optimizer as optimizers
from posenc_jax.distributed import sharding
from posenc_jax.training.schedule import Schedule
from posenc_jax.training.memory import device_memory
from posenc_jax.training.step import State, abstract_model, initial_state, make_train_step, repeated

# Members of a program may differ in these settings, which reach it in arrays or through the structure of the model,
# and in no others that training looks at.
CARRIED = ("name", "seed", "encoding", "temperature", "optimizer.learning_rate", "optimizer.weight_decay", "evaluation")

Metrics = dict[str, Shaped[np.ndarray, "M steps"]]


@dataclass(frozen=True)
class Member:
    """What became of a run: its final state, as arrays of the host, and the metrics of all its steps.

    If a loss or gradient was not finite, the state is that before the step `stopped_at`, which counts from 1.
    """

    state: State
    metrics: dict[str, Shaped[np.ndarray, "steps"]]
    stopped_at: int | None


def train_members(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    devices: Sequence[Any] | None = None,
    vectorized: bool | None = None,
    memory: int | None = None,
) -> list[Member]:
    """Train runs from their start to their end, those that can be members of one program together.

    Args:
      configs: the runs, whose results come in the same order.
      dataset: what all of them read.
      devices: all that there are, if not given.
      vectorized: whether a device takes its members at once; by default on accelerators alone. Always where the
        settings divide a model.
      memory: bytes that a program may take of each device, by default all. Where members need more, they are trained in
        as few equal parts as fit, one part after another.
    """
    members: dict[int, Member] = {}
    for group in groups(configs):
        own = [configs[i] for i in group]
        program, size = fitting_program(own, dataset, devices=devices, vectorized=vectorized, memory=memory)
        for part, filled in parts(len(group), size):
            trained = _members(program.train([own[i] for i in filled]))
            members |= zip((group[i] for i in part), trained, strict=False)
    return [members[i] for i in range(len(configs))]


def fitting_program(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    devices: Sequence[Any] | None = None,
    vectorized: bool | None = None,
    memory: int | None = None,
) -> tuple["Program", int]:
    """The program of a group, and how many members fit it at a time; the arguments are those of `train_members`."""
    devices = jax.devices() if devices is None else devices
    axes, training = configs[0].sharding, configs[0].training
    at_once = devices[0].platform != "cpu" if vectorized is None else vectorized
    at_once = at_once or axes.fsdp * axes.tensor > 1
    rows = training.batch_size // training.grad_accum_steps
    mesh = sharding.make_members_mesh(len(configs), rows, devices, **plain(axes), shares_rows=at_once)
    program = Program(configs[0], dataset, mesh, at_once)
    return program, program.size(len(configs), device_memory(devices) if memory is None else memory)


def parts(count: int, size: int) -> Iterator[tuple[range, list[int]]]:
    """Indices of the members that are trained at a time, and the same filled up to `size` by repeating them."""
    for start in range(0, count, size):
        part = range(start, min(start + size, count))
        yield part, np.resize(part, size).tolist()


def groups(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Indices of the runs that can be members of one program, each group in order, the groups by their first run."""
    found: dict[Hashable, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(program_of(config), []).append(i)
    return list(found.values())


_programs: dict[Hashable, Hashable] = {}  # results of program_of, by what determines them and by themselves


def program_of(config: RunConfig) -> Hashable:
    """Equal for runs that one compiled program trains: the settings it is made from, and what it is applied to.

    Equal results are one object, which is kept: a study of many seeds holds no more than a study of one seed.
    """
    settings = json.dumps(
        {
            field: value
            for field, value in flat(plain(config)).items()
            if not any(field == carried or field.startswith(f"{carried}.") for carried in CARRIED)
        }
    )
    key = settings, config.encoding, config.temperature
    if key not in _programs:
        optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: initial_state(config, optimizer)))
        program = settings, abstract_model(config)[0], tuple(leaves), structure
        _programs[key] = _programs.setdefault(program, program)
    return _programs[key]


class Program:
    """The steps of the members of a group, compiled once for a number of them.

    Args:
      config: any one of them.
      dataset: what they read.
      mesh: of `sharding.make_members_mesh`; each part along "members" takes an equal share of the members.
      vectorized: whether it takes its share at once, or one after another, which a part of one device can.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, mesh: Mesh, vectorized: bool):
        self._config, self._dataset, self._mesh = config, dataset, mesh
        self._parts = mesh.shape["members"]
        self._vectorized = vectorized
        self.schedule = Schedule.of(config, pipeline.epoch_tokens(dataset.splits["train"], config.training.length))
        self._abstract = jax.eval_shape(lambda: initial_state(config, self._optimizer(config)))
        self._states = sharding.placement(self._abstract, mesh, "members")
        self._batches = NamedSharding(mesh, PartitionSpec("members", None, sharding.row_axes(mesh)))
        self.compiled = functools.cache(self._compile)
        self.needed = functools.cache(self._needed)

    def size(self, count: int, memory: int) -> int:
        """Members to train at a time, of each part of the devices as many: the fewest rounds of `count` that fit."""
        rounds = 1
        while True:
            size = self._parts * math.ceil(count / (rounds * self._parts))
            if size == self._parts:
                return size
            needed = self.needed(size)
            if needed is not None and needed <= memory:
                return size
            rounds = max(rounds + 1, 0 if needed is None else rounds * needed // memory)

    def initial_states(self, configs: Sequence[RunConfig]) -> State:
        """The states [M, ...] of runs of the group before their first step."""
        initial = (jax.device_get(initial_state(config, self._optimizer(config))) for config in configs)
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *initial), self._states)

    def train(
        self, configs: Sequence[RunConfig], states: State | None = None, step: int = 0
    ) -> Iterator[tuple[int, State, Metrics]]:
        """Train runs of the group; after each dispatch its last step, the states [M, ...], and metrics [M, its steps].

        A dispatch ends as those of a single run do. It takes the states of the one before it, which are then gone.
        `states` are those after `step`, to go on from; by default training begins.
        """
        latest = self.initial_states(configs) if states is None else states
        last_encoded = self.schedule.total - self.schedule.drope
        dispatches = self._dispatches([config.seed for config in configs], step)
        ahead = next(dispatches, None)
        while ahead is not None:
            step, count, batches = ahead
            latest, metrics = self.compiled(len(configs), step > last_encoded)(latest, batches, np.int32(count))
            ahead = next(dispatches, None)  # read while the devices are busy
            yield step, latest, {name: values[:, :count] for name, values in jax.device_get(metrics).items()}

    def _dispatches(self, seeds: Sequence[int], step: int) -> Iterator[tuple[int, int, jax.Array]]:
        """Last step, number of steps, and batches [M, K, B, N] of each dispatch, the rest of K not to be looked at."""
        training, split, schedule = self._config.training, self._dataset.splits["train"], self.schedule
        K = schedule.most_per_dispatch
        streams = {
            seed: pipeline.training_batches(
                split, length=training.length, batch_size=training.batch_size, seed=seed, start_step=step
            )
            for seed in seeds
        }
        while step < schedule.total:
            first, step = step, schedule.dispatch_end(step)
            read = {seed: np.stack(list(itertools.islice(stream, step - first))) for seed, stream in streams.items()}
            of_members = np.stack([np.resize(read[seed], (K, *read[seed].shape[1:])) for seed in seeds])
            yield step, step - first, jax.device_put(of_members, self._batches)

    def _compile(self, size: int, dropped: bool) -> jax.stages.Compiled:
        config, mesh = self._config, self._mesh
        optimizer = self._optimizer(config)
        graphdef, _ = abstract_model(config, dropped=dropped)
        token_bytes = jnp.asarray(self._dataset.tokenizer.token_bytes)
        train_steps = repeated(make_train_step(config, graphdef, optimizer, token_bytes))

        def train_members_steps(states, batches, count):
            if self._vectorized:
                return jax.vmap(train_steps, (0, 0, None), spmd_axis_name=shared)(states, batches, count)
            return jax.lax.map(lambda x: train_steps(x[0], x[1], count), (states, batches))

        of_members, training = PartitionSpec("members"), config.training
        shared = None if mesh.size == self._parts else "members"  # the compiler divides a member over devices of a part
        if not shared:
            in_specs = (of_members, of_members, PartitionSpec())
            train_members_steps = jax.shard_map(
                train_members_steps, mesh=mesh, in_specs=in_specs, out_specs=of_members, check_vma=False
            )
        states = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=place),
            self._abstract,
            self._states,
        )
        shape = (size, self.schedule.most_per_dispatch, training.batch_size, training.length + 1)
        batches = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._batches)
        results = (self._states, NamedSharding(mesh, of_members))
        with jax.set_mesh(mesh):
            program = jax.jit(train_members_steps, donate_argnums=0, out_shardings=results)
            return program.lower(states, batches, np.int32(0)).compile()

    def _needed(self, size: int) -> int | None:
        """Bytes that a program takes of each device; None if its compiler, as that for TPUs, finds it has fewer."""
        try:
            usage = self.compiled(size, False).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        assert usage is not None
        given, made = usage.argument_size_in_bytes, usage.output_size_in_bytes + usage.temp_size_in_bytes
        return given + made - usage.alias_size_in_bytes

    def _optimizer(self, config: RunConfig) -> optimizers.Optimizer:
        schedule = self.schedule
        return optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)


def _members(dispatches: Iterable[tuple[int, State, Metrics]]) -> Iterator[Member]:
    """What becomes of the runs that are trained by these dispatches."""
    states, history = {}, []
    for _, latest, metrics in dispatches:
        states = latest
        history.append(metrics)
    states = jax.device_get(states)
    metrics = {name: np.concatenate([values[name] for values in history], axis=1) for name in history[0]}
    for i, finite in enumerate(metrics["finite"]):
        state = jax.tree.map(lambda of_all, i=i: of_all[i, ...], states)
        stopped_at = None if finite.all() else int(finite.argmin()) + 1
        yield Member(state, {name: values[i] for name, values in metrics.items()}, stopped_at)
