"""An encoder of BERT's form: every token sees all others, and hidden ones are predicted from both sides.

python launch.py --config=configs/bert.py                          learned positions, as BERT has
python launch.py --config=configs/bert.py:positions=rope           or sinusoidal, or none
python launch.py --config=configs/bert.py:tokens=bytes             bytes, as the other recipes read, for WordPiece
python launch.py --config=configs/bert.py:size=base                BERT-base's shape, for an accelerator
python launch.py --config=configs/bert.py:size=smoke               under a minute, to see that all works

Expect, reading bytes with one seed, bits per byte of hidden tokens at the training length: rope 2.271; learned 4.548,
sinusoidal 4.498 and none 4.507: a bag of bytes tells little more than how frequent each is (4.881 by the frequencies
of the training text). Added positions take far longer to be used: learned ones are still there after 2,000 steps
(4.452); sinusoidal ones have left it after 1,000 steps where norms come before each branch (3.772).

Layer norm after each residual sum, GELU, constants everywhere, 15 % of the tokens hidden. Source: Devlin et al. 2019.
Differs from it: no second segment and no next-sentence task (as RoBERTa, Liu et al. 2019), no dropout at the default
size, whose training sees few tokens twice, and WordPiece over bytes, so that bits per byte compare with other models.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(
        argument,
        positions=("learned", "sinusoidal", "rope", "none"),
        tokens=("wordpiece", "bytes"),
        size=("default", "smoke", "base"),
    )
    config = rope_extrap.get_config(f"size={chosen['size']},encoding={chosen['positions']}")
    config.name, model = config.name.replace("rope_extrap", "bert"), config.model
    model.causal, model.post_norm, model.use_bias = False, True, True
    model.norm, model.activation = "layer", "gelu"
    model.d_ff = 4 * model.d_model
    config.evaluation.rope_scalings = ("none",)
    if chosen["positions"] == "learned":
        config.evaluation.lengths = tuple(n for n in config.evaluation.lengths if n <= config.training.length)
    config.data.tokenizer = chosen["tokens"]
    config.data.vocab_size = 256 if chosen["tokens"] == "bytes" else {"base": 30522}.get(chosen["size"], 4096)
    if chosen["size"] == "base":
        model.dropout, model.remat = 0.1, False
        config.optimizer.learning_rate = 1e-4
    return config
