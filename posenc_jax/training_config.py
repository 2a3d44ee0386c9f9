"""The settings of training: its steps, its devices and its optimizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posenc_jax.schema import Count, Duration, Fraction, NonNegative, Positive, Range

Length = Annotated[int, Range(at_least=2, at_most=2**24, why="up to which float32 counts positions")]


@dataclass(frozen=True)
class TrainingConfig:
    length: Length
    pretrained_length: Annotated[int, Range(at_least=0, at_most=2**24)]
    batch_size: Count
    grad_accum_steps: Count
    cpu_devices: Count
    mask_ratio: Annotated[float, Range(above=0, below=1)]
    drope: Duration
    duration: Duration
    warmup: Duration
    decay: Duration
    log_every: Duration
    validate_every: Duration
    checkpoint_every: Duration
    keep_last: Annotated[int, Range(at_least=2)]
    allow_schedule_change: bool
    steps_per_dispatch: Count
    profile: Duration


@dataclass(frozen=True)
class ShardingConfig:
    fsdp: Count
    tensor: Count
    parallel_runs: Annotated[int, Range(at_least=0)]


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "lion", "muon", "adafactor"]
    learning_rate: Positive
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    end_lr_ratio: Fraction
    b1: Annotated[float, Range(at_least=0, below=1)]
    b2: Annotated[float, Range(at_least=0, below=1)]
    eps: Positive
    weight_decay: NonNegative
    weight_decay_mask: str
    grad_clip_norm: Positive
