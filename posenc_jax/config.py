"""The settings of a run as frozen, checked dataclasses, converted from the files in configs/.

configs/base.py has the default and the meaning of every field. jax is imported only to convert an encoding's settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from posenc_jax import config_checks
from posenc_jax.data_config import DataConfig
from posenc_jax.encodings import frequencies
from posenc_jax.files import sha256_of
from posenc_jax.layer_config import ALIKE, EncodingConfig, Layer, LayersConfig, TemperatureConfig, layers_of
from posenc_jax.model_config import ModelConfig, TransformerConfig
from posenc_jax.results import RETRIEVAL
from posenc_jax.schema import ConfigError, Count, Range, convert, flat, plain
from posenc_jax.task_config import ON_TEXT, TaskConfig, with_lengths
from posenc_jax.training_config import Length, OptimizerConfig, ShardingConfig, TrainingConfig


@dataclass(frozen=True)
class PositionsConfig:
    training: Literal["contiguous", "offset", "randomized", "random_float"]
    range: Annotated[int, Range(at_least=1, at_most=2**24, why="up to which float32 counts positions")]
    per_layer: bool
    evaluation: Literal["contiguous", "drawn", "even", "interpolated"]

    def reach(self, length: int) -> int:
        """Upper bound of the positions of training windows of `length` tokens."""
        return length if self.training == "contiguous" else self.range


@dataclass(frozen=True)
class EvaluationConfig:
    lengths: tuple[Length, ...]
    windows: Annotated[int, Range(at_least=1, at_most=100_000)]
    tail: Count
    long_perplexity: bool
    copy_distances: tuple[Count, ...]
    copy_chunk: Annotated[int, Range(at_least=2)]
    retrieval_tasks: tuple[Literal[tuple(RETRIEVAL)], ...]  # type: ignore[valid-type]
    retrieval_lengths: tuple[Length, ...]
    retrieval_trials: Annotated[int, Range(at_least=1, at_most=10_000)]
    retrieval_depths: Annotated[int, Range(at_least=1)]
    retrieval_by: Literal["teacher_forcing", "generation"]
    rope_scalings: tuple[frequencies.EvaluationText, ...]
    batch_tokens: Count
    validation_windows: Count
    resamples: Annotated[int, Range(at_least=100)]

    @property
    def task_lengths(self) -> tuple[int, ...]:
        """The lengths of the retrieval tasks, in tokens."""
        return self.retrieval_lengths or self.lengths


@dataclass(frozen=True)
class LoggingConfig:
    wandb: str
    sample_prompt: str
    sample_tokens: Annotated[int, Range(at_least=1, at_most=10_000)]


@dataclass(frozen=True)
class RunConfig:
    name: str
    seed: Annotated[int, Range(at_least=0, below=2**31)]
    init_from: str
    init_sha256: str
    data: DataConfig
    model: ModelConfig
    encoding: EncodingConfig
    positions: PositionsConfig
    temperature: TemperatureConfig
    training: TrainingConfig
    sharding: ShardingConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    layers: LayersConfig = ALIKE
    task: TaskConfig = ON_TEXT

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RunConfig":
        """Convert nested settings, as of `ConfigDict.to_dict()` or of a run's config.json; raises ConfigError.

        Lengths that are None come from the sizes of the task.
        """
        mapping = with_lengths(mapping)
        for field, value in flat(mapping).items() if isinstance(mapping, Mapping) else ():
            if value is None:
                raise ConfigError(f"config.{field}", None, "must be given, or come from a model in config.init_from")
        config = convert(cls, mapping)
        config_checks.check(config)
        return config

    @property
    def pretrained_length(self) -> int:
        """Tokens of context in the first training of the model. A run that starts from another model inherits it."""
        return self.training.pretrained_length or self.training.length

    @property
    def trained_size(self) -> int:
        """What results call the training length: tokens of context or, of a task, the largest size in training."""
        return self.task.max_size or self.pretrained_length

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        return self.task.task.vocab_size if self.task.name else self.data.vocab_size

    @property
    def short_window(self) -> int:
        """Tokens in the window with a short context, for evaluation.long_perplexity. Its last tokens are the tail."""
        return self.pretrained_length // 8 + self.evaluation.tail

    @property
    def pretrained_reach(self) -> int:
        """Upper bound of the positions in the first training: the original length of scaling rules."""
        return self.positions.reach(self.pretrained_length)

    @property
    def model_layers(self) -> tuple[Layer, ...]:
        """How each layer of a transformer attends; () for a model without attention."""
        if not isinstance(self.model, TransformerConfig):
            return ()
        return layers_of(self.model, self.encoding, self.temperature, self.layers)

    @property
    def label(self) -> str:
        """Name of the run in tables: its encoding or, for a recurrent model, its architecture."""
        if not isinstance(self.model, TransformerConfig):
            return self.model.architecture
        return self.encoding.name if self.model.causal else f"encoder_{self.encoding.name}"

    @property
    def masks_tokens(self) -> bool:
        """Whether the model is trained and scored on masked tokens, as an encoder."""
        return isinstance(self.model, TransformerConfig) and not self.model.causal

    @property
    def packed(self) -> bool:
        """Whether a training window holds several documents."""
        return self.data.packing == "documents"

    @property
    def marks_tokens(self) -> bool:
        """Whether a training batch has a second number for each token: its document, or of a task, if it is scored."""
        return self.packed or bool(self.task.name)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of a training batch: [B, N] or, if it `marks_tokens`, [B, 2, N]."""
        return (self.training.batch_size, *([2] if self.marks_tokens else []), self.training.length + 1)

    @property
    def validation_length(self) -> int:
        """Tokens in a window of validation. If `packed`, not more than in evaluation, as documents may be short."""
        longest = self.evaluation.lengths[-1]
        return min(self.training.length, longest) if self.packed else self.training.length

    @property
    def evaluates_only(self) -> bool:
        """Whether the run measures the model of `init_from` without training it."""
        return self.training.duration.amount == 0

    @property
    def located(self) -> set[str]:
        """The settings that only say where something is. A checksum, which is another setting, identifies it."""
        return {"init_from", "data.tokenizer"} if self.data.tokenizer_file else {"init_from"}

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify what is trained and measured."""
        free = (set(RESUMABLE) - {"training.duration"}) | self.located
        settings = {field: value for field, value in flat(plain(self)).items() if field not in free}
        settings = {field: value for field, value in settings.items() if ADDED.get(field) != value}
        return sha256_of(settings)[:12]


# Fields that may change when a run is continued, as may those that are `located`.
RESUMABLE = (
    "training.duration",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.allow_schedule_change",
    "training.steps_per_dispatch",
    "training.profile",
    "data.cache_dir",
    "sharding.fsdp",
    "sharding.tensor",
    "sharding.parallel_runs",
    "logging.wandb",
    "logging.sample_prompt",
    "logging.sample_tokens",
)
# Settings that the records of earlier runs may lack, and the values that those runs had. The fingerprint leaves these
# values out, so that it is the same as before.
ADDED = {
    "data.field": "text",
    "data.tokenizer_sha256": "",
    "data.packing": "none",
    "encoding.bidirectional": False,
    "encoding.key_offset": False,
    "model.attention_sinks": False,
    "model.attention_gate": False,
    "model.canon": False,
    "optimizer.name": "adamw",
    "optimizer.schedule": "cosine",
    "training.decay": "0 steps",
    "logging.wandb": "",
    "logging.sample_prompt": "",
    "logging.sample_tokens": 64,
}
