"""Writes a model as a Hugging Face folder: config.json, safetensors, and tokenizer."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from posenc_jax.errors import reason
from posenc_jax.interop import equivalent, families
from posenc_jax.interop.equivalent import Params
from posenc_jax.interop.family import Architecture, Tensor, period
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.hf_folder import INDEX
from posenc_jax.schema import ConfigError

SHARD_BYTES = 5 * 10**9  # of one safetensors file


class Conflict(NamedTuple):
    """A setting, its value, and what a family needs instead."""

    field: str
    value: Any
    needed: str


class Plan(NamedTuple):
    """A model as one of a family.

    Attributes:
      model_type: the family, by the `model_type` of its config.json.
      fields: those of config.json.
      target: the settings that `fields` stand for, which may differ from those of the model by `converted`.
      converted: old and new value of each setting that changes without a change of the output.
      conflicts: settings that the family cannot express. If there are any, no other attribute is of use.
    """

    model_type: str
    fields: dict[str, Any]
    target: Architecture
    converted: dict[str, tuple[Any, Any]]
    conflicts: list[Conflict]


def plan(architecture: Architecture, params: Mapping[str, Any]) -> Plan:
    """The family that expresses the model with the fewest conversions; the first of those in `families.TABLE`.

    Args:
      architecture: the settings of the model.
      params: its parameters by path, without those of an encoding that no layer uses.

    Raises:
      ConfigError: no family can express the model. The error lists the settings that the nearest ones lack.
    """
    ours = equivalent.complete(architecture)
    plans = [_plan(model_type, ours, params) for model_type in families.TABLE]
    possible = [own for own in plans if not own.conflicts]
    if possible:
        return min(possible, key=lambda own: len(own.converted))
    nearest = min(plans, key=lambda own: len(own.conflicts))
    told = f"{nearest.model_type}, the nearest family, cannot express {_listed(nearest.conflicts)}"
    same = [own for own in plans if "config.encoding.name" not in [conflict.field for conflict in own.conflicts]]
    if same and nearest not in same:
        other = min(same, key=lambda own: len(own.conflicts))
        told += f"; {other.model_type}, which has this encoding, cannot express {_listed(other.conflicts)}"
    first = nearest.conflicts[0]
    raise ConfigError(first.field, first.value, f"has no counterpart in transformers: {told}")


def _listed(conflicts: list[Conflict]) -> str:
    return ", ".join(f"{field} = {value!r} ({needed})" for field, value, needed in conflicts)


def _plan(model_type: str, ours: Architecture, params: Mapping[str, Any]) -> Plan:
    family = families.load({"model_type": model_type}, "config.json")
    try:
        fields = {"model_type": model_type} | family.write(ours, model_type)
    except ConfigError as error:
        others = _plan(model_type, _without(ours, error.field), params).conflicts
        return Plan(model_type, {}, ours, {}, [*others, Conflict(error.field, error.value, error.allowed)])
    read = Fields(fields, "config.json")
    try:
        target = equivalent.complete(family.read(read))
        read.finish()
    except ConfigError as error:
        return Plan(model_type, {}, ours, {}, [Conflict(error.field, error.value, error.allowed)])
    changed = equivalent.differences(ours, target)
    converted = {name: values for name, values in changed.items() if equivalent.convertible(name, *values)}
    conflicts = [_conflict(name, *values) for name, values in changed.items() if name not in converted]
    if not conflicts:
        absent = (path for tensor in family.tensors(target) if not tensor.names for path in tensor.params)
        nonzero = [path for path in absent if path in params and np.any(np.asarray(params[path]))]
        if nonzero:
            conflicts = [Conflict(f"parameter {nonzero[0]}", "not zero", "does not have it, so it must be zero")]
    return Plan(model_type, fields, target, converted, conflicts)


def _without(architecture: Architecture, field: str) -> Architecture:
    """The architecture with a value of this setting that every family has."""
    model, encoding, name = dict(architecture.model), dict(architecture.encoding), field.rpartition(".")[2]
    if name == "num_heads":
        model |= {"num_heads": 1, "num_kv_heads": 1, "head_dim": model["d_model"]}
    else:
        encoding[name] = {"scaling": "none", "fraction": 1.0, "max_exponent": 8.0}[name]
    return architecture._replace(model=model, encoding=encoding)


def _conflict(name: str, old: Any, new: Any) -> Conflict:
    if name == "model.pattern":
        old, new = period(old), period(new)
    needed = f"needs {new!r}"
    if name == "model.norm" and old == "rms":
        needed += "; an RMSNorm does not subtract the mean, so it cannot be written as a layer norm"
    return Conflict(f"config.{name}", old, needed)


def write(
    output: Path,
    plan: Plan,
    architecture: Architecture,
    params: Params,
    tokenizer: tuple[str, Mapping[str, Any]],
    *,
    dtype: DTypeLike = np.float32,
    shard_bytes: int = SHARD_BYTES,
    end_tokens: Iterable[int] = (),
) -> None:
    """Write a folder, which must be new or empty. It gets its name when it is complete.

    Args:
      output: the folder.
      plan: that of `architecture` and `params`.
      architecture: the settings of the model.
      params: its parameters by path.
      tokenizer: the texts of tokenizer.json, and the fields of tokenizer_config.json.
      dtype: of the weights in the files, float32 or bfloat16.
      shard_bytes: largest size of one file. A single tensor may be larger.
      end_tokens: tokens that end a text, if they are known.

    Raises:
      ConfigError: the folder is not new or empty, or it cannot be written.
    """
    check_output(output)
    ours = equivalent.complete(architecture)
    params = equivalent.convert(params, ours, plan.target)
    tensors = families.load(plan.fields, "config.json").tensors(plan.target)
    config = {"architectures": [families.TABLE[plan.fields["model_type"]][0]], **plan.fields}
    # None replaces the defaults of a family, which are ids of another vocabulary.
    config |= {"bos_token_id": None, "eos_token_id": sorted(end_tokens) or None, "pad_token_id": None}
    config["dtype"] = np.dtype(dtype).name
    definition, tokenizer_config = tokenizer
    with _new_folder(output, sum(np.size(x) for x in params.values()) * np.dtype(dtype).itemsize) as folder:
        _write_weights(folder, tensors, params, dtype, shard_bytes)
        (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
        for path in folder.glob("*.safetensors"):  # which only their owner could read
            path.chmod((folder / "tokenizer.json").stat().st_mode)
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
        _write_json(folder / "config.json", config)


def _write_weights(folder: Path, tensors: Iterable[Tensor], params: Params, dtype: DTypeLike, shard_bytes: int) -> None:
    """Write the tensors in their order, to as many files as needed. The tensors of one file are in memory at a time."""
    shards: list[list[str]] = []
    shard, total = dict[str, np.ndarray](), 0

    def save() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for tensor in tensors:
        packed = tensor.pack(*(np.asarray(params[path]) for path in tensor.params))
        for name, array in zip(tensor.names, packed, strict=True):
            own = np.ascontiguousarray(array, dtype)
            if shard and sum(x.nbytes for x in shard.values()) + own.nbytes > shard_bytes:
                save()
            shard[name] = own
            total += own.nbytes
    save()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"{i}.safetensors").rename(folder / file)
    placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def check_output(output: Path) -> None:
    """Raise ConfigError unless a folder is new or empty."""
    try:
        empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    except OSError as error:
        raise ConfigError("--output", str(output), f"cannot be read: {reason(error)}") from None
    if not empty:
        raise ConfigError("--output", str(output), "must be a new or an empty folder: nothing is overwritten")


@contextlib.contextmanager
def _new_folder(output: Path, needed: int) -> Iterator[Path]:
    """A folder beside `output`, which gets its name if the block ends, and is deleted if it raises.

    Raises ConfigError for OSErrors, and if less than `needed` bytes are free.
    """
    output = output.resolve()
    temporary = output.with_name(f"{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            allowed = f"needs {needed / 1e6:,.2f} MB, and {free / 1e6:,.2f} MB are free there"
            raise ConfigError("--output", str(output), allowed)
        temporary.mkdir()
        yield temporary
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        raise ConfigError("--output", str(output), f"cannot be written: {reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
