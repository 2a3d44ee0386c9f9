"""LongPPL: the perplexity of key tokens, which a long context makes much likelier.

Most tokens need only a short context, so the mean loss over all tokens hardly shows whether a model uses a long one. A
judge selects the key tokens. It must predict a key token well with a long context, with a loss below `MAX_NATS`. Its
loss must be more than `MIN_GAIN` nats higher with a short context that ends at the same place.

Source: Fang et al. 2024 ("What is Wrong with Perplexity for Long-context Language Modeling?"), with their thresholds.
Let C be the length of the model's first training. There are three differences:

- The judge is the evaluated model itself, without a scaling rule of the evaluation, and with at most C tokens. In the
  paper the judge is one stronger model, which exists for no tokenizer and text of a model trained here. All scaling
  rules of a model have the same key tokens at a length, so their values are paired. Other models have other key tokens,
  so values of different models are not paired.
- The long context is that of a window of min(L, C) tokens, and the short context has at least C // 8 tokens. In the
  paper the long context is the whole text, and the short one has at least 4,096 tokens, in windows that slide by 1,024.
- Key tokens are among the last `evaluation.tail` tokens of a window. In the paper they are anywhere in the text after
  its first 4,096 tokens.

At lengths up to C, the value without a rule is that of the judge, so it is below exp(MAX_NATS) by definition.
"""

import numpy as np
from jaxtyping import Bool, Float

MAX_NATS = 2.0  # -beta in the paper
MIN_GAIN = 2.0  # alpha in the paper


def key_tokens(long: Float[np.ndarray, "W T"], short: Float[np.ndarray, "W T"]) -> Bool[np.ndarray, "W T"]:
    """Which tokens are key tokens, from the judge's losses in nats with the long and with the short context."""
    return (long < MAX_NATS) & (short - long > MIN_GAIN)
