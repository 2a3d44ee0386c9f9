"""Programs: runs that differ only in the values of arrays share compiled code, and can be stacked.

A stack of one is a single run. The state of a larger stack has a leading axis with one entry per run. A device trains
its runs one after another (`jax.lax.map`, the default on CPU) or at once (`jax.vmap`, the default on accelerators), and
exchanges nothing with other devices. If there are more devices than runs, or the settings shard the model, several
devices share each run. With `jax.lax.map` on one device, each run has the same bits as alone on one device. With
`jax.vmap`, or on several devices, results differ by rounding, because XLA orders the sums differently.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posenc_jax.config import RunConfig
from posenc_jax.data.tokens import Dataset
from posenc_jax.distributed import sharding
from posenc_jax.evaluation.attention_stats import AttentionStats
from posenc_jax.evaluation.generator import Generator
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.evaluation.window_sums import WindowSums
from posenc_jax.runs import sources
from posenc_jax.runs.grid import RunSpec
from posenc_jax.runs.task_data import TaskData
from posenc_jax.runs.text_data import TextData
from posenc_jax.schema import flat, plain
from posenc_jax.training import memory
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.schedule import Schedule
from posenc_jax.training.step import State, abstract_model, abstract_state, initial_state, make_train_step, repeated

# Runs that share a program may differ only in these settings. They enter the program as arrays or through the structure
# of the model, which is compared.
CARRIED = ("name", "seed", "encoding", "temperature", "optimizer.learning_rate", "optimizer.weight_decay", "evaluation")

PROMPT = "config.logging.sample_prompt"

_keys: dict[Hashable, Hashable] = {}  # results of program_key, by the settings that determine them and by themselves


def program_key(config: RunConfig) -> Hashable:
    """A key that is equal for runs that one compiled program can train: settings, model structure and array shapes.

    Equal keys are the same object, so that a study of many seeds keeps no more keys than a study of one seed.
    """
    carried = tuple(f"{field}." for field in CARRIED)
    shared = {field: value for field, value in flat(plain(config)).items() if not f"{field}.".startswith(carried)}
    settings = json.dumps(shared)
    determined_by = settings, config.encoding, config.temperature
    if determined_by not in _keys:
        optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: initial_state(config, optimizer)))
        key = settings, abstract_model(config)[0], tuple(leaves), structure
        _keys[determined_by] = _keys.setdefault(key, key)
    return _keys[determined_by]


def groups(specs: Sequence[RunSpec], key: Callable[[RunSpec], Hashable] | None = None) -> list[list[RunSpec]]:
    """Runs grouped by key, by default by program. Groups are ordered by their first run."""
    found: dict[Hashable, list[RunSpec]] = {}
    for spec in specs:
        found.setdefault(key(spec) if key else program_key(spec.config), []).append(spec)
    return list(found.values())


def shards(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Runs grouped by program, together with the runs that continue them. Each shard can be trained on its own."""
    return groups(specs, lambda spec: program_key(spec.root.config))


class Program:
    """Data, devices, train steps, scorers and attention statistics of runs that share compiled code.

    `config` has the settings of any one of the runs. `dataset` is the text of runs on text. `devices` are all devices
    by default. Raises ConfigError if the devices do not fit the sharding, or the model does not fit into memory.
    """

    def __init__(self, config: RunConfig, dataset: Dataset | None = None, devices: Sequence[Any] | None = None):
        training, axes = config.training, config.sharding
        self.config, self.data = config, TaskData(config) if dataset is None else TextData(config, dataset)
        self._devices = jax.devices() if devices is None else devices
        self._rows = training.batch_size // training.grad_accum_steps
        self.mesh = sharding.make_mesh(self._rows, self._devices, fsdp=axes.fsdp, tensor=axes.tensor)
        trains = not config.evaluates_only
        memory.check_fits(config, self.mesh, trains=trains)
        (with_encoding, self.parameters), (without, _) = (abstract_model(config, dropped=d) for d in (False, True))
        memory.check_fits(config, self.mesh, self.parameters, trains=trains)
        self.graphdefs = with_encoding, without  # `without` is used after DroPE has dropped the encoding
        self.schedule = Schedule.of(config, self.data.epoch_tokens if trains else 0)
        batch_tokens = config.evaluation.batch_tokens
        self.scorers = [Scorer(graphdef, self.mesh, batch_tokens) for graphdef in self.graphdefs]
        self.final_scorer = self.scorers[training.drope.amount > 0]  # of the trained model
        self.attention_stats = [AttentionStats(graphdef, self.mesh) for graphdef in self.graphdefs]

    @functools.cached_property
    def _end_tokens(self) -> frozenset[int]:
        """The tokens that end a text for the model that the runs start from."""
        source = sources.of_run(self.config)
        return source.end_tokens if source else frozenset()

    @functools.cached_property
    def single(self) -> "Stack":
        """The stack of one, on all devices. It can train all runs of the program in turn."""
        return Stack(self, 1, self.mesh)

    def stack(self, count: int, *, vectorized: bool | None = None, available: int | None = None) -> "Stack":
        """The largest stack that fits into memory and trains `count` runs in the fewest rounds of equal size.

        `vectorized` tells whether a device trains its runs at once. By default only accelerators do. It is always so if
        the settings shard the model. A program may use `available` bytes of each device, by default all.
        """
        axes, devices = self.config.sharding, self._devices
        at_once = devices[0].platform != "cpu" if vectorized is None else vectorized
        at_once = at_once or axes.fsdp * axes.tensor > 1
        mesh = sharding.make_stack_mesh(count, self._rows, devices, **plain(axes), shares_rows=at_once)
        available = memory.device_memory(devices) if available is None else available
        parts, rounds = mesh.shape["runs"], 1

        def size() -> int:
            return parts * math.ceil(count / (rounds * parts))

        while True:
            stack = Stack(self, size(), mesh, vectorized=at_once)
            if stack.size == 1:
                return self.single
            needed = None if stack.size == parts else stack.memory()
            if stack.size == parts or (needed is not None and needed <= available):
                return stack
            rounds = max(rounds + 1, 0 if needed is None else rounds * needed // available)
            while size() == stack.size:
                rounds += 1

    def optimizer(self, config: RunConfig) -> optimizers.Optimizer:
        """The optimizer of one run."""
        own = self.schedule
        return optimizers.build(config.optimizer, total_steps=own.total, warmup_steps=own.warmup, decay_steps=own.decay)

    def validate(self, config: RunConfig, params: Any, constants: Any, dropped: bool) -> dict[str, Any]:
        """The losses of a validation, and the attention statistics of each layer."""
        values = self.data.validate(ScoredModel(config, self.scorers[dropped], params, constants))
        windows = self.data.validation_windows, self.data.validation_positions
        return values | self.attention_stats[dropped](config, params, constants, *windows)

    def sample(self, config: RunConfig, params: Any, constants: Any, dropped: bool) -> str:
        """The prompt of `config.logging` and the most likely text after it; "" without a prompt."""
        prompt = config.logging.sample_prompt
        if not prompt:
            return ""
        generator = self._generator(config, params, constants, dropped)
        ids = generator.encode(prompt, PROMPT)
        with jax.set_mesh(self.mesh):
            steps = list(generator.generate([ids], config.logging.sample_tokens))
        new = b"".join(generator.bytes_of(token) for step in steps for _, token in step)
        return prompt + new.decode(errors="replace")

    def _generator(self, config: RunConfig, params: Any, constants: Any, dropped: bool) -> Generator:
        assert isinstance(self.data, TextData)
        arrays, tokenizer = (self.graphdefs[dropped], params, constants), self.data.dataset.tokenizer
        return Generator(config, *arrays, tokenizer, end_tokens=self._end_tokens)

    def measure(self, config: RunConfig, params: Any, constants: Any, scorer: Scorer | None = None) -> WindowSums:
        """What all results of a run are computed from.

        `scorer` is `final_scorer` by default, or a ScoreCache of it.
        """
        return self.data.measure(ScoredModel(config, scorer or self.final_scorer, params, constants))

    def trace(self) -> None:
        """Trace train steps, validation and evaluation.

        A run that only evaluates has no train steps and no validation. No array is allocated, so that a run that cannot
        work fails before it writes files. jax keeps the traces for the run. Raises ConfigError if memory cannot hold
        the tokens of a dispatch.
        """
        config, schedule = self.config, self.schedule
        state, K = abstract_state(config, self.optimizer(config), self.mesh), schedule.max_per_dispatch
        model = state["params"], state["constants"]
        dropping = [False] * (schedule.drope < schedule.total) + [True] * (schedule.drope > 0)
        if dropping:
            batches = sharding.abstract_rows((K, *config.batch_shape), self.mesh, axis=1)
            memory.check_dispatch_fits(config, batches)
        for dropped in dropping:
            with jax.set_mesh(self.mesh):
                self.single.train_steps(dropped).eval_shape(state, batches, K)
            self.data.trace_validation(ScoredModel(config, self.scorers[dropped], *model))
            self.attention_stats[dropped].trace(config, *model, config.validation_length)
            if prompt := config.logging.sample_prompt:
                generator = self._generator(config, *model, dropped)
                count, new = len(generator.encode(prompt, PROMPT)), config.logging.sample_tokens
                generator.check_length(count, new, PROMPT, "config.logging.sample_tokens")
        self.data.trace_measures(ScoredModel(config, self.final_scorer, *model))


class Stack:
    """Runs of one program that the same calls train: their states, batches and compiled train steps.

    `mesh` is `program.mesh` for one run, and otherwise a mesh of `sharding.make_stack_mesh`, whose axis "runs" divides
    the runs equally. `vectorized` tells whether each part of the mesh trains its runs at once. Only parts of one device
    can train them one after another.
    """

    def __init__(self, program: Program, size: int, mesh: Mesh, *, vectorized: bool = False):
        self.program, self.size, self.mesh, self._vectorized = program, size, mesh, vectorized
        self._axis = ("runs",) if size > 1 else ()
        config = program.config
        self._abstract = jax.eval_shape(lambda: initial_state(config, program.optimizer(config)))
        self._placed = sharding.placement(self._abstract, mesh, *self._axis)
        self._compiled: dict[bool, Any] = {}

    def initial_states(self, configs: Sequence[RunConfig]) -> State:
        """The states before the first step, with random parameters."""
        if self.size == 1:
            return initial_state(configs[0], self.program.optimizer(configs[0]), self.mesh)
        own = (jax.device_get(initial_state(c, self.program.optimizer(c))) for c in self._filled(configs))
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *own), self._placed)

    def split(self, states: Any) -> Iterator[Any]:
        """The state of each run, or a part of it, on the host. A stack of one yields its state unchanged."""
        if self.size == 1:
            yield states
            return
        states = jax.device_get(states)
        for i in range(self.size):
            yield jax.tree.map(lambda of_all, i=i: of_all[i, ...], states)

    def models(self, states: State) -> Iterator[tuple[Any, Any]]:
        """Parameters and constants of each run, on the devices that score it."""
        own = states["params"], states["constants"]
        if self.size == 1:
            yield own
            return
        placed = sharding.placement({name: self._abstract[name] for name in ("params", "constants")}, self.program.mesh)
        for on_host in self.split(own):
            model = jax.device_put(on_host, (placed["params"], placed["constants"]))
            try:
                yield model
            finally:  # reference cycles would keep it for a while
                jax.tree.map(lambda x: x.delete(), model)

    def reader(self, seeds: Sequence[int], start_step: int) -> Callable[[int], jax.Array]:
        """A function that returns the next `count` batches on the devices: [K, B, N], or [M, K, B, N] for a stack.

        Packed batches are [B, 2, N]. Batches past `count` are padding. Runs with the same seed have the same batches,
        which are read once.
        """
        batch_size, K = self.program.config.training.batch_size, self.program.schedule.max_per_dispatch
        rows = sharding.own_rows(batch_size, self.mesh)
        streams = {seed: self.program.data.batches(seed, start_step, rows) for seed in seeds}

        def read(count: int) -> jax.Array:
            own = {seed: np.stack(list(itertools.islice(stream, count))) for seed, stream in streams.items()}
            filled = {seed: np.resize(batches, (K, *batches.shape[1:])) for seed, batches in own.items()}
            if self.size == 1:
                return sharding.shard_rows(filled[seeds[0]], self.mesh, axis=1, count=batch_size)
            return jax.device_put(np.stack([filled[seed] for seed in self._filled(seeds)]), self._batches())

        return read

    def memory(self) -> int | None:
        """Bytes per device that a call needs; None if the compiler reports too little memory, as on TPUs."""
        try:
            usage = self.train_steps(False).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        assert usage is not None
        given, made = usage.argument_size_in_bytes, usage.output_size_in_bytes + usage.temp_size_in_bytes
        return given + made - usage.alias_size_in_bytes

    def train_steps(self, dropped: bool) -> Any:
        """The jitted train steps (states, batches, count) -> (states, metrics), with or without the encoding."""
        if dropped not in self._compiled:
            self._compiled[dropped] = self._jit(dropped)
        return self._compiled[dropped]

    def _jit(self, dropped: bool) -> Any:
        """jax compiles the steps of one run at their first call. Those of a larger stack are compiled here."""
        program, mesh, config = self.program, self.mesh, self.program.config
        step = make_train_step(config, program.graphdefs[dropped], program.optimizer(config), program.data.token_bytes)
        train_steps, of_runs = repeated(step), PartitionSpec(*self._axis)
        options = {"donate_argnums": 0, "out_shardings": (self._placed, NamedSharding(mesh, of_runs))}
        if self.size == 1:
            return jax.jit(train_steps, **options)
        # The compiler partitions a run that several devices share.
        shared = None if mesh.size == mesh.shape["runs"] else "runs"

        def stacked_train_steps(states, batches, count):
            if self._vectorized:
                return jax.vmap(train_steps, (0, 0, None), spmd_axis_name=shared)(states, batches, count)
            return jax.lax.map(lambda run: train_steps(run[0], run[1], count), (states, batches))

        if not shared:
            specs = {"in_specs": (of_runs, of_runs, PartitionSpec()), "out_specs": of_runs}
            stacked_train_steps = jax.shard_map(stacked_train_steps, mesh=mesh, check_vma=False, **specs)

        def stacked(x, place):
            return jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype, sharding=place)

        shape = self.size, program.schedule.max_per_dispatch, *config.batch_shape
        batches = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._batches())
        states = jax.tree.map(stacked, self._abstract, self._placed)
        with jax.set_mesh(mesh):
            return jax.jit(stacked_train_steps, **options).lower(states, batches, 0).compile()

    def _batches(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("runs", None, sharding.row_axes(self.mesh)))

    def _filled(self, own: Sequence[Any]) -> list[Any]:
        """Repeat the items until there is one for each run of the stack."""
        return list(itertools.islice(itertools.cycle(own), self.size))
