"""Layers with RoPE between layers without positions: three published patterns, and DroPE.

python launch.py --config=configs/hybrid.py                        smollm3: every fourth layer has no RoPE
python launch.py --config=configs/hybrid.py:form=command_a         also a sliding window on layers with RoPE
python launch.py --config=configs/hybrid.py:form=irope             also Llama 4's temperature on layers without RoPE
python launch.py --config=configs/hybrid.py:form=drope             RoPE in all layers until the last eighth of training

Windows and the temperature's floor are scaled to the training length. Command A's window of 4096 tokens is half of the
context length of its first training. Llama 4's chunks of 8192 tokens are as long as the context of its first training;
here a sliding window replaces them.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, form=("smollm3", "command_a", "irope", "drope"), size=("default", "smoke"))
    config = rope_extrap.get_config(f"size={chosen['size']}")
    config.name = chosen["form"]
    if chosen["form"] == "drope":
        steps = int(config.training.duration.split()[0])
        config.training.drope = f"{steps // 8} steps"
        return config
    config.model.pattern = "EEEN" if config.model.num_layers >= 4 else "EN"
    if chosen["form"] == "command_a":
        config.model.window = config.training.length // 2
    elif chosen["form"] == "irope":
        config.model.window = config.training.length
        config.temperature.form, config.temperature.layers = "llama4", "N"
        config.temperature.floor = config.training.length
    return config
