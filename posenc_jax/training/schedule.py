"""The schedule of a run in steps: when it logs, validates and saves, and how long each of its parts is."""

from dataclasses import dataclass

from posenc_jax.config import RunConfig
from posenc_jax.schema import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Durations of a run in whole steps."""

    total: int
    warmup: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    drope: int
    profile: int
    max_per_dispatch: int
    decay: int = 0

    @classmethod
    def of(cls, config: RunConfig, tokens_per_epoch: int) -> "Schedule":
        """Convert durations to steps. Raises ConfigError for 2^31 steps or more, and for parts longer than the run.

        A run of 0 steps, which only evaluates, has no parts.
        """
        training = config.training
        if config.evaluates_only:
            return cls(0, 0, 1, 1, 1, 0, 0, 1)

        def steps(name: str) -> int:
            duration, tokens_per_step = getattr(training, name), training.batch_size * training.length
            count = duration.steps(tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch)
            if count >= 2**31:
                raise ConfigError(f"config.training.{name}", duration.plain(), f"must be below 2^31 steps, not {count}")
            return count

        total = steps("duration")
        for name in ("warmup", "drope"):
            if steps(name) > total:
                allowed = f"must be at most the {total} steps of training.duration, and is {steps(name)}"
                raise ConfigError(f"config.training.{name}", getattr(training, name).plain(), allowed)
        left = total - steps("warmup")
        if steps("decay") > left:
            allowed = f"must be at most the {left} steps after the warm-up, and is {steps('decay')}"
            raise ConfigError("config.training.decay", training.decay.plain(), allowed)
        log, validate, checkpoint = (steps(f"{name}_every") for name in ("log", "validate", "checkpoint"))
        most = min(training.steps_per_dispatch, total, log, validate, checkpoint)
        parts = steps("drope"), steps("profile")
        return cls(total, steps("warmup"), log, validate, checkpoint, *parts, most, steps("decay"))

    def dispatch_end(self, step: int, *stops: int) -> int:
        """The last step of the dispatch that starts after `step`.

        It has at most `max_per_dispatch` steps. It ends early at a step that is logged, validated or saved, at the
        last step with the encoding, at the last step of the run, and at each of `stops`.
        """
        every = (self.log_every, self.validate_every, self.checkpoint_every)
        stops = (*stops, self.total, self.total - self.drope)
        ends = [step - step % n + n for n in every] + [stop for stop in stops if stop > step]
        return min(step + self.max_per_dispatch, *ends)
