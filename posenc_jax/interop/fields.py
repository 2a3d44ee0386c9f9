"""The fields of a foreign model's description, each of which is read, known to be harmless, or an error."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from posenc_jax.schema import ConfigError

MISSING = object()
MAX_COUNT = 2**24  # of layers, channels, tokens

# Fields of config.json that do not change the logits of a language model: names, ids, training, and output options.
# fmt: off
HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attn_pdrop", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout",
    "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "init_device", "initializer_range", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "slow_but_exact", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
})
# fmt: on


class Fields:
    """A mapping whose fields are taken one by one. `finish` refuses those that nobody took.

    `path` is the file and section that errors name. Errors are ConfigErrors.
    """

    def __init__(self, values: Mapping[str, Any], path: str):
        self._values, self._taken, self.path = dict(values), set[str](), path

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def rename(self, **names: str) -> None:
        """Give fields another name, that of the second of each pair. Raises ConfigError if both have values."""
        for old, new in names.items():
            value = self._values.pop(old, None)
            if value is not None and self._values.setdefault(new, value) != value:
                raise self.error(old, value, f"must be {self._values[new]!r}, as {new} is")

    def ignore(self, *names: str) -> None:
        """Accept any value of these fields, which do not change the output of this architecture."""
        self._taken.update(names)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = MISSING, null: Any = MISSING) -> Any:
        """The value of a field, of this kind. `default` stands for a field that is absent, and for null if no `null`.

        `null` stands for a field that is null.
        """
        self._taken.add(name)
        value = self._values.get(name)
        if value is None:
            if null is not MISSING and name in self._values:
                return null
            if default is MISSING:
                raise self.error(name, None, "is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.error(name, value, "must be " + " or ".join(own.__name__ for own in kinds))
        return value

    def count(self, name: str, default: Any = MISSING, null: Any = MISSING) -> int:
        """The value of a field that is an integer from 1 to MAX_COUNT. The other arguments are those of `take`."""
        value: int = self.take(name, int, default, null)
        if not 1 <= value <= MAX_COUNT:
            raise self.error(name, value, f"must be an integer from 1 to {MAX_COUNT}")
        return value

    def choose(self, name: str, known: Mapping[str, str], default: Any = MISSING) -> str:
        """What a field's value is called here. `known` maps each value that has a counterpart."""
        value = self.take(name, str, default)
        if value not in known:
            raise self.error(name, value, "must be one of: " + ", ".join(known), known)
        return known[value]

    def expect(self, **values: Any) -> None:
        """Refuse other values of these fields. Absent and null fields are accepted."""
        for name, only in values.items():
            self._taken.add(name)
            value = self._values.get(name)
            if value is not None and value != only:
                allowed = f"must be {only!r}: another value changes the output and has no counterpart in posenc_jax"
                raise self.error(name, value, allowed)

    def finish(self) -> None:
        """Refuse fields that were not taken and may change the output."""
        self.expect(add_cross_attention=False, is_encoder_decoder=False, tie_encoder_decoder=False)
        for name in sorted(self._values.keys() - self._taken - HARMLESS):
            if self._values[name] is not None:
                near = difflib.get_close_matches(name, self._taken, n=1)
                hint = f"; the nearest known field is {near[0]!r}" if near else ""
                allowed = "is not known for this architecture, and may change the output"
                raise self.error(name, self._values[name], allowed + hint)

    def error(self, name: str, value: Any, allowed: str, options: Iterable[str] = ()) -> ConfigError:
        """The error for a field. `options` are values that are allowed, of which the nearest is told."""
        return ConfigError(f"{self.path}: {name}", value, allowed, options)
