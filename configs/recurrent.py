"""Recurrent language models with as many parameters as the transformer of configs/rope_extrap.py.

python launch.py --config=configs/recurrent.py                     two LSTM layers
python launch.py --config=configs/recurrent.py:cell=gru            or rnn (no gates)
python launch.py --config=configs/recurrent.py:cell=elmo           a forward and a backward LSTM, layers mixed
python launch.py --config=configs/recurrent.py:size=smoke          less than a minute, to try everything

These models read tokens one after another, so they need no encoding. Expected bits per byte (`prefix`) at 1x and 8x the
training length, with one seed: rnn 1.984 and 1.853, lstm 2.308 and 2.195 (2.068 and 1.942 at learning rate 0.008), gru
1.988 and 1.857, elmo 2.869 and 2.738. Each has 0.88 to 0.89 million parameters, like the transformer. ELMo's training
loss is the mean of its two directions. Validation and evaluation use only the forward direction, half of its layers.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap
from posenc_jax.model_config import RECURRENT

WIDTHS = {"rnn": 440, "lstm": 228, "gru": 260, "elmo": 163}


def get_config(argument: str = "") -> ConfigDict:
    cells = ("lstm", *(name for name in RECURRENT if name != "lstm"))
    chosen = base.options(argument, cell=cells, size=("default", "smoke"))
    config = rope_extrap.get_config(f"size={chosen['size']},encoding=none")
    config.name = config.name.replace("rope_extrap", "recurrent")
    config.model = base.recurrent(chosen["cell"], config.model)
    config.model.num_layers = 2
    if chosen["size"] == "default":
        config.model.d_model = WIDTHS[chosen["cell"]]
    return config
