"""An encoder like BERT: every token sees all others, and masked tokens are predicted from both sides.

python launch.py --config=configs/bert.py                          learned positions, as in BERT
python launch.py --config=configs/bert.py:positions=rope           or sinusoidal, or none
python launch.py --config=configs/bert.py:tokens=bytes             bytes, as in the other recipes, instead of WordPiece
python launch.py --config=configs/bert.py:size=base                BERT-base's shape, for an accelerator
python launch.py --config=configs/bert.py:size=smoke               less than a minute, to try everything

Expected bits per byte of masked tokens at the training length, with bytes and one seed: rope 2.271, learned 4.548,
sinusoidal 4.498, none 4.507. A model without positions learns little more than byte frequencies (4.881 from the
frequencies of the training text). Models need far longer to use added positions. Learned positions are still unused
after 2,000 steps (4.452). Sinusoidal positions are used after 1,000 steps if norms precede each branch (3.772).

Layer norm after each residual sum, GELU, biases in all linear layers, 15 % of the tokens masked. Source: Devlin et al.
2019. Differences: no second segment and no next-sentence task (as in RoBERTa, Liu et al. 2019); no dropout at the
default size, because its training sees few tokens twice; WordPiece works over bytes, so bits per byte are comparable.
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
