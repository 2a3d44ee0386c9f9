"""The settings of a run as frozen, checked dataclasses, converted from the files in configs/.

configs/base.py has the default and the meaning of every field. jax is imported only to convert an encoding's settings.
"""

import functools
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from posenc_jax import encodings
from posenc_jax.data_config import DataConfig
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.position_maps import METHODS
from posenc_jax.evaluation_config import OF_ALL, EvaluationConfig, LoggingConfig, PositionsConfig
from posenc_jax.files import sha256_of
from posenc_jax.identity import ADDED, RESUMABLE
from posenc_jax.layer_config import ALIKE, ENCODING, EncodingConfig, Layer, LayersConfig, TemperatureConfig, layers_of
from posenc_jax.model_config import RECURRENT, ModelConfig, TransformerConfig
from posenc_jax.schema import ConfigError, Range, convert, flat, plain
from posenc_jax.task_config import LENGTHS, ON_TEXT, TaskConfig, with_lengths
from posenc_jax.training_config import OptimizerConfig, ShardingConfig, TrainingConfig

MAX_DRAWN = 10**7  # windows that the bootstrap of one interval draws in total: 80 MB
# Settings that an optimizer or a schedule does not use. They must then have their defaults.
UNUSED = {
    "lion": {"eps": 1e-8},
    "adafactor": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "constant": {"end_lr_ratio": 0.1},
}


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
        _check_together(config)
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
        """The shape of a training batch: [B, N], [B, 2, N] if it `marks_tokens`, or [B, 3, N] with places of a task."""
        numbers = 1 + self.marks_tokens + self.positions.of_task
        return (self.training.batch_size, *([numbers] if numbers > 1 else []), self.training.length + 1)

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


def _check_together(config: RunConfig) -> None:
    """Raise ConfigError for the first condition between fields that does not hold."""
    model, data, training, evaluation = config.model, config.data, config.training, config.evaluation
    require = functools.partial(_require, config)
    named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", config.name)
    require("name", named, "must be letters, digits, '_', '.' and '-', at most 100, as it names a folder")
    if isinstance(model, TransformerConfig):
        _check_transformer(config, model)
    else:
        _check_without_attention(config)
    divided = training.batch_size % training.grad_accum_steps == 0
    require("training.grad_accum_steps", divided, f"must divide batch_size = {training.batch_size}")
    checksum = "[0-9a-f]{64}" if config.init_from else ""
    allowed = f"must be {'the sha256 of its weights' if checksum else repr('')} for init_from = {config.init_from!r}"
    require("init_sha256", re.fullmatch(checksum, config.init_sha256), allowed)
    known = data.tokenizer != "init_from" or config.init_from
    require("data.tokenizer", known, "must be bytes, bpe, wordpiece or a tokenizer.json without config.init_from")
    checksum = "[0-9a-f]{64}" if data.tokenizer_file else ""
    allowed = f"must be {'the sha256 of this file' if checksum else repr('')} for data.tokenizer = {data.tokenizer!r}"
    require("data.tokenizer_sha256", re.fullmatch(checksum, data.tokenizer_sha256), allowed)
    split = data.test_fraction < 0.5 or (data.test_fraction == 1 and config.evaluates_only)
    require("data.test_fraction", split, "must be below 0.5, or 1 for training.duration = '0 steps'")
    sized = data.tokenizer != "bytes" or data.vocab_size == 256
    require("data.vocab_size", sized, "must be 256 for the bytes tokenizer")
    for name in ("duration", "log_every", "validate_every", "checkpoint_every"):
        duration = getattr(training, name)
        if duration.amount == 0 and not (name == "duration" and config.init_from):
            hint = "; 0, to evaluate only, needs config.init_from" if name == "duration" else ""
            raise ConfigError(f"config.training.{name}", duration.plain(), f"must be above 0{hint}")
    _check_optimizer(config)
    increasing = evaluation.lengths and list(evaluation.lengths) == sorted(set(evaluation.lengths))
    require("evaluation.lengths", increasing, "must be one or more increasing lengths")
    trained = config.pretrained_length
    require("training.pretrained_length", trained >= 2, "must be 0, for training.length, or at least 2")
    allowed = f"must be at most {trained}, the training length, and the shortest evaluation length"
    require("evaluation.tail", evaluation.tail <= min(trained, evaluation.lengths[0]), allowed)
    if evaluation.long_perplexity:
        _check_long_perplexity(config)
    most = MAX_DRAWN // evaluation.windows
    allowed = f"must be at most {most} for evaluation.windows = {evaluation.windows}"
    require("evaluation.resamples", evaluation.resamples <= most, allowed)
    _check_copies(config)
    _check_retrieval(config)
    reached = config.positions.training == "contiguous" or config.positions.range >= training.length
    require("positions.range", reached, f"must be at least training.length = {training.length}")
    restarting = config.positions.training == "contiguous" or not config.packed
    require("positions.training", restarting, "must be 'contiguous' for data.packing = 'documents'")
    _check_scalings(config)
    _check_places(config)
    if config.task.name:
        _check_task(config)
    project = re.fullmatch(r"[A-Za-z0-9_.-]{0,128}", config.logging.wandb)
    require("logging.wandb", project, "must be the name of a project: letters, digits, '_', '.' and '-', at most 128")
    allowed = "must be '' for a model that is not causal: it predicts masked tokens"
    require("logging.sample_prompt", not (config.logging.sample_prompt and config.masks_tokens), allowed)


def _require(config: RunConfig, field: str, holds: object, allowed: str) -> None:
    """Raise ConfigError for a field, such as "training.length", unless the condition holds."""
    if not holds:
        raise ConfigError(f"config.{field}", operator.attrgetter(field)(config), allowed)


def _require_values(values: Mapping[str, tuple[Any, Any]], why: str) -> None:
    """Raise ConfigError unless each field, by name, has the only value that is allowed: the second of two."""
    for field, (value, only) in values.items():
        if value != only:
            raise ConfigError(f"config.{field}", value, f"must be {only!r} for {why}")


def _check_task(config: RunConfig) -> None:
    """Check that the settings of a run on a task have the lengths of its samples, and nothing that needs text."""
    own, model = config.task, config.model
    for section, field in LENGTHS.items():
        value, only = getattr(getattr(config, section), field), own.lengths[section]
        if value != only:
            allowed = f"must be None or {only!r}, the tokens of task {own.name!r} with these sizes"
            raise ConfigError(f"config.{section}.{field}", value, allowed)
    evaluation, why = config.evaluation, f"task {own.name!r}"
    causal = ("transformer", *(name for name in RECURRENT if name != "elmo"))
    allowed = f"must be one of: {', '.join(causal)}, for {why}, because elmo reads the answers"
    _require(config, "model.architecture", model.architecture in causal, allowed)
    only_text = {
        "data.packing": (config.data.packing, "none"),
        "evaluation.copy_distances": (evaluation.copy_distances, ()),
        "evaluation.retrieval_tasks": (evaluation.retrieval_tasks, ()),
        "evaluation.long_perplexity": (evaluation.long_perplexity, False),
        "logging.sample_prompt": (config.logging.sample_prompt, ""),
        "init_from": (config.init_from, ""),
    }
    _require_values(only_text, why)
    for name in ("duration", "warmup", "drope", "decay", "log_every", "validate_every", "checkpoint_every", "profile"):
        duration = getattr(config.training, name)
        allowed = f"must be in steps or tokens for {why}, which has no epochs"
        _require(config, f"training.{name}", duration.unit != "epochs", allowed)


def _check_places(config: RunConfig) -> None:
    """Check a schedule whose positions come with the samples of a task."""
    positions, task = config.positions, config.task
    own = task.task.schedules if task.name else ()
    known, read = (*OF_ALL, *own), f"task {task.name!r}" if task.name else "text"
    allowed = f"must be one of: {', '.join(known)}, for {read}"
    _require(config, "positions.training", positions.training in known, allowed)
    if positions.of_task:
        only = {"positions.evaluation": (positions.evaluation, "drawn")}
        only |= {"positions.per_layer": (positions.per_layer, False)}
        _require_values(only, f"positions.training = {positions.training!r}")


def _check_scalings(config: RunConfig) -> None:
    """Check that the scaling rules of training and evaluation give finite frequencies at every length."""
    model, evaluation = config.model, config.evaluation
    field = "config.evaluation.rope_scalings"
    rules = {f"{field}[{i}]": frequencies.parse(x, f"{field}[{i}]") for i, x in enumerate(evaluation.rope_scalings)}
    distinct = len(set(evaluation.rope_scalings)) == len(rules) and "none" in evaluation.rope_scalings
    _require(config, "evaluation.rope_scalings", distinct, 'must be distinct and hold "none"')
    scaled, alone = hasattr(config.encoding.hyperparameters, "scaling"), evaluation.rope_scalings == ("none",)
    allowed = f'must be ("none",) for encoding {config.encoding.name!r}, which has no frequencies to scale'
    _require(config, "evaluation.rope_scalings", scaled or alone, allowed)
    methods = [rule for rule in evaluation.rope_scalings if frequencies.parse(rule).rule in METHODS]
    allowed = f"must not have {', '.join(methods)} for a model that is not causal: it needs keys behind a query"
    _require(config, "evaluation.rope_scalings", not (methods and config.masks_tokens), allowed)
    used = {layer.path: layer.encoding for layer in config.model_layers} | {ENCODING: config.encoding}
    used = {path: own for path, own in used.items() if hasattr(own.hyperparameters, "scaling")}
    for path, own in used.items():
        assert isinstance(model, TransformerConfig)  # other models have no encoding to scale
        hyperparameters = own.hyperparameters
        trained = frequencies.parse(hyperparameters.scaling, f"{path}.scaling")
        if len(used) > 1 and trained.own_follows_length:
            allowed = "must not follow the length, because other layers have another encoding with a scaling rule"
            raise ConfigError(f"{path}.scaling", str(trained), allowed)
        layers = [layer for layer in config.model_layers if layer.scaling_change and layer.path == path]
        changed = [(layer.scalings_path, layer.rule(rule)) for layer in layers for rule in rules.values()]
        for field, rule in (*rules.items(), (f"{path}.scaling", trained), *changed):
            width = int(hyperparameters.fraction * model.head_dim)
            rule.check(width, hyperparameters.base, config.pretrained_reach, evaluation.lengths, field)


def _check_long_perplexity(config: RunConfig) -> None:
    require = functools.partial(_require, config, "evaluation.long_perplexity")
    require(not config.masks_tokens, "must be False for a model that is not causal: it predicts masked tokens")
    trained, longest = config.pretrained_length, config.evaluation.lengths[-1]
    allowed = f"must be False if the training length = {trained} or the longest length = {longest} is at most "
    allowed += f"{config.short_window} tokens, an eighth of the training length plus evaluation.tail"
    require(config.short_window < min(trained, longest), allowed)


def _check_copies(config: RunConfig) -> None:
    require = functools.partial(_require, config, "evaluation.copy_distances")
    distances, chunk = config.evaluation.copy_distances, config.evaluation.copy_chunk
    most = config.evaluation.lengths[-1] - chunk
    if distances:
        require(not config.masks_tokens, "must be () for a model that is not causal: it predicts masked tokens")
        require(list(distances) == sorted(set(distances)), "must be increasing")
        allowed = f"must be from copy_chunk = {chunk} to {most} = longest length - copy_chunk"
        require(chunk <= distances[0] <= distances[-1] <= most, allowed)


def _check_retrieval(config: RunConfig) -> None:
    require, evaluation = functools.partial(_require, config), config.evaluation
    tasks, lengths = evaluation.retrieval_tasks, evaluation.retrieval_lengths
    require("evaluation.retrieval_tasks", len(set(tasks)) == len(tasks), "must be distinct")
    allowed = "must be () for a model that is not causal: it predicts masked tokens"
    require("evaluation.retrieval_tasks", not (tasks and config.masks_tokens), allowed)
    longest = evaluation.lengths[-1]
    increasing = list(lengths) == sorted(set(lengths)) and (not lengths or lengths[-1] <= longest)
    allowed = f"must be increasing and at most {longest}, the longest of config.evaluation.lengths"
    require("evaluation.retrieval_lengths", increasing, allowed)


def _check_transformer(config: RunConfig, model: TransformerConfig) -> None:
    require, sharding = functools.partial(_require, config), config.sharding
    grouped = model.num_heads % model.num_kv_heads == 0
    require("model.num_kv_heads", grouped, f"must divide num_heads = {model.num_heads}")
    layers, used = config.model_layers, set(model.pattern[: model.num_layers])
    allowed = f'must have an E or G among the first {model.num_layers} layers; for no encoding choose encoding "none"'
    require("model.pattern", any(layer.letter != "N" and layer.path == ENCODING for layer in layers), allowed)
    for layer in layers:
        name = layer.encoding.name
        if config.training.drope.amount and encodings.load(name).head_factor > 1:
            allowed = f"must be '0 steps' for encoding {name!r}: layers without it have fewer attention heads"
            raise ConfigError("config.training.drope", config.training.drope.plain(), allowed)
    for letter, section in config.layers.sections:
        if letter not in used:
            allowed = f"must be a letter of the first {model.num_layers} layers in config.model.pattern"
            raise ConfigError(f"config.layers.{letter}", section.plain(), f"{allowed}, which is {model.pattern!r}")
    for name in ("branch_norm", "embedding_norm", "parallel_residual"):
        one = not (model.post_norm and getattr(model, name))
        require(f"model.{name}", one, "must be False for post_norm = True, which places its norms otherwise")
    divided = (("fsdp", "d_model"), ("tensor", "num_heads"), ("tensor", "num_kv_heads"), ("tensor", "d_ff"))
    for axis, name in divided:
        size = getattr(model, name)
        require(f"sharding.{axis}", size % getattr(sharding, axis) == 0, f"must divide config.model.{name} = {size}")
    if not model.causal:
        only = {"model.window": (model.window, 0), "temperature.form": (config.temperature.form, "none")}
        only |= {"model.canon": (model.canon, False)}
        for letter, section in config.layers.sections:
            form = section.temperature.form if section.temperature else "none"
            only |= {f"layers.{letter}.window": (section.window or 0, 0)}
            only |= {f"layers.{letter}.temperature.form": (form, "none")}
        _require_values(only, "a model that is not causal: it counts the tokens behind a query")


def _check_optimizer(config: RunConfig) -> None:
    optimizer, decay = config.optimizer, config.training.decay
    try:
        re.compile(optimizer.weight_decay_mask)
    except (re.error, OverflowError, RecursionError) as error:
        _require(config, "optimizer.weight_decay_mask", False, f"must be a regular expression: {error}")
    for name in (optimizer.name, optimizer.schedule):
        only = {f"optimizer.{field}": (getattr(optimizer, field), own) for field, own in UNUSED.get(name, {}).items()}
        _require_values(only, f"{name}, which does not use it")
    if (decay.amount > 0) != (optimizer.schedule == "wsd"):
        allowed = "must be above 0 for schedule 'wsd', and '0 steps' for all others"
        raise ConfigError("config.training.decay", decay.plain(), allowed)


def _check_without_attention(config: RunConfig) -> None:
    """Refuse settings that act on attention in a model without attention."""
    only = {
        "encoding.name": (config.encoding.name, "none"),
        "positions.training": (config.positions.training, "contiguous"),
        "positions.evaluation": (config.positions.evaluation, "contiguous"),
        "temperature.form": (config.temperature.form, "none"),
        "layers": (config.layers.plain(), {}),
        "training.drope": (config.training.drope.amount, 0),
        "sharding.fsdp": (config.sharding.fsdp, 1),
        "sharding.tensor": (config.sharding.tensor, 1),
    }
    _require_values(only, f"architecture {config.model.architecture!r}, without attention")
