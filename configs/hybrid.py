"""Layers that differ in their positions: the patterns of eight published models, and DroPE.

python launch.py --config=configs/hybrid.py                        smollm3: every fourth layer has no RoPE
python launch.py --config=configs/hybrid.py:form=command_a         also a sliding window on layers with RoPE
python launch.py --config=configs/hybrid.py:form=irope             also Llama 4's temperature on layers without RoPE
python launch.py --config=configs/hybrid.py:form=swan              also a temperature for long texts on these layers
python launch.py --config=configs/hybrid.py:form=gemma3            after five layers with windows, a global one
python launch.py --config=configs/hybrid.py:form=gemma4            also p-RoPE on the global layers
python launch.py --config=configs/hybrid.py:form=olmo3             a window on three layers of four
python launch.py --config=configs/hybrid.py:form=gpt_oss           a window on every other layer, and attention sinks
python launch.py --config=configs/hybrid.py:form=drope             RoPE in all layers until the last eighth of training

Windows and the temperature's floor are scaled to the training length. Command A's window of 4096 tokens is half of the
context length of its first training, and so is OLMo 3's. Llama 4's chunks of 8192 tokens are as long as the context of
its first training; here a sliding window replaces them. The windows of Gemma 3 (1024 tokens) and gpt-oss (128) are 1/32
of the context of their first training. For Gemma 4 and SWAN, 1/32 and 1/8 are our choice.

Scaling rules of the evaluation change only the global layers of Gemma 3 and OLMo 3, as Gemma 3's own factor of 8 and
OLMo 3's YaRN do, and all layers of gpt-oss, as its YaRN does. SWAN's temperature changes nothing in training. Here its
formula is Qwen's (`logn`). Gemma 4's global layers also have wider heads, which are left out.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap

FORMS = ("smollm3", "command_a", "irope", "swan", "gemma3", "gemma4", "olmo3", "gpt_oss", "drope")
PATTERNS = {"gemma3": "LLLLLG", "gemma4": "LLLLLG", "olmo3": "LLLG", "gpt_oss": "EG"}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, form=FORMS, size=("default", "smoke"))
    form = chosen["form"]
    config = rope_extrap.get_config(f"size={chosen['size']}" + (",encoding=p_rope" if form == "gemma4" else ""))
    config.name = form
    model, length = config.model, config.training.length
    if form == "drope":
        steps = int(config.training.duration.split()[0])
        config.training.drope = f"{steps // 8} steps"
        return config
    model.pattern = PATTERNS.get(form, "EEEN" if model.num_layers >= 4 else "EN")
    model.num_layers = max(model.num_layers, len(model.pattern))
    if form == "command_a":
        model.window = length // 2
    elif form == "irope":
        model.window = length
        config.temperature.form, config.temperature.layers = "llama4", "N"
        config.temperature.floor = length
    elif form == "swan":
        model.window = length // 8
        config.temperature.form, config.temperature.layers = "logn", "N"
        config.evaluation.rope_scalings = ("none",)  # windows never reach distances that are new
    elif form == "gpt_oss":
        config.encoding.base, model.window, model.attention_sinks = 150_000.0, max(length // 32, 2), True
    elif form == "olmo3":
        config.encoding.base, model.qk_norm = 500_000.0, True
        config.layers.L = ConfigDict({"window": length // 2, "rope_scalings": False})
    elif form in ("gemma3", "gemma4"):
        local = base.encoding("rope")  # with base 10,000
        config.layers.L = ConfigDict({"encoding": local, "window": max(length // 32, 2), "rope_scalings": False})
        config.encoding.base, model.qk_norm = 1e6, True
    if form == "gemma4":
        config.encoding.fraction = 0.25
    return config
