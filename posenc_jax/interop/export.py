"""Writes a trained model as a Hugging Face folder, which transformers loads to equal logits.

python -m posenc_jax.interop.export runs/rope_extrap-rope-58ec05805b90 --output exported
python -m posenc_jax.interop.export runs/rope_extrap-rope-58ec05805b90 --output exported --dtype bfloat16

The folder holds config.json, the weights in safetensors, tokenizer.json and tokenizer_config.json. If no family of
transformers has all settings of the model, the error names those without counterpart.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posenc_jax import command
from posenc_jax.schema import ConfigError

if TYPE_CHECKING:
    from posenc_jax.config import RunConfig
    from posenc_jax.interop.equivalent import Params
    from posenc_jax.interop.family import Architecture


def main(arguments: list[str]) -> None:
    """Raises the errors of `export`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m posenc_jax.interop.export", description=__doc__, formatter_class=form)
    parser.add_argument("workdir", type=Path, help="folder of a trained run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    note = "largest size of a file of weights, in MB; default: 5000"
    parser.add_argument("--shard-mb", type=command.count, default=5000, metavar="MB", help=note)
    args = parser.parse_args(arguments)
    print(export(args.workdir, args.output, dtype=args.dtype, shard_bytes=args.shard_mb * 10**6))


def export(workdir: Path, output: Path, *, dtype: str = "float32", shard_bytes: int = 5 * 10**9) -> str:
    """Write the newest intact checkpoint of a run as a Hugging Face folder. Returns a text that says what was written.

    Args:
      workdir: folder of a run with a checkpoint. It is not changed.
      output: a new or empty folder outside of `workdir`.
      dtype: of the weights in the files, float32 or bfloat16.
      shard_bytes: largest size of a file of weights. A single tensor may be larger.

    Raises:
      ConfigError: the model has no counterpart in transformers, or `output` cannot be written.
      WorkdirError, CheckpointError: the run cannot be read.
    """
    import jax.numpy as jnp  # jax reads its environment variables, which are checked before main
    from flax.traverse_util import flatten_dict

    from posenc_jax.data.tokenizer_json import tokenizer_json
    from posenc_jax.data.tokens import load_tokenizer
    from posenc_jax.interop import hf_writer
    from posenc_jax.runs import sources, trained

    if output.resolve().is_relative_to(workdir.resolve()):
        raise ConfigError("--output", str(output), f"must be outside of the workdir {workdir}")
    hf_writer.check_output(output)
    if not sources.is_run(workdir):
        allowed = "must be the folder of a run; other models are exported after a run with config.init_from"
        raise ConfigError("workdir", str(workdir), allowed)
    config = trained.read_config(workdir)
    model = architecture(config)
    if config.evaluates_only:
        allowed = f"must be a run that trains: this one only evaluates {config.init_from}"
        raise ConfigError("workdir", str(workdir), allowed)
    tokenizer = tokenizer_json(load_tokenizer(config.data, trained.read_tokenizer(workdir)), mask=config.masks_tokens)
    params: Params = dict(flatten_dict(trained.load(workdir).params, sep="/"))
    if model.encoding["name"] == "none":
        params = {path: x for path, x in params.items() if not path.startswith("encoding_")}
    plan = hf_writer.plan(model, params)
    options = {"dtype": jnp.dtype(dtype), "shard_bytes": shard_bytes, "end_tokens": trained.read_end_tokens(workdir)}
    hf_writer.write(output, plan, model, params, tokenizer, **options)
    count = sum(x.size for x in params.values())
    changed = [f"config.{name} = {new!r} for {old!r}" for name, (old, new) in plan.converted.items()]
    told = f"; without a change of the output it has {', '.join(changed)}" if changed else ""
    return f"{output}: {plan.fields['model_type']}, {count:,} parameters in {dtype}{told}"


def architecture(config: "RunConfig") -> "Architecture":
    """The settings of a run's model at the end of its training.

    Raises ConfigError for settings outside of the model that change its output and that transformers does not have.
    """
    from posenc_jax.config import TransformerConfig
    from posenc_jax.interop import families
    from posenc_jax.interop.family import Architecture
    from posenc_jax.schema import plain

    if not isinstance(config.model, TransformerConfig):
        allowed = f"has no counterpart in transformers: only transformers are exported, as {', '.join(families.TABLE)}"
        raise ConfigError("config.model.architecture", config.model.architecture, allowed)
    only: dict[str, tuple[Any, Any]] = {"temperature.form": (config.temperature.form, "none")}
    only |= {"layers": (config.layers.plain(), {})}
    only |= {"positions.evaluation": (config.positions.evaluation, "contiguous")}
    for field, (value, needed) in only.items():
        if value != needed:
            raise ConfigError(f"config.{field}", value, f"has no counterpart in transformers, which needs {needed!r}")
    encoding, length = config.encoding.plain(), config.pretrained_reach
    if config.training.drope.amount:  # the encoding was dropped during training
        encoding = {"name": "none"}
    if encoding["name"] == "sinusoidal":  # as a table, which needs a length; this one is the longest that was measured
        length = max(length, *config.evaluation.lengths)
    return Architecture(plain(config.model), encoding, length, config.data.vocab_size)


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
