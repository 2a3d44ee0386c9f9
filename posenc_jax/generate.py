"""Continues a prompt with a trained model, and prints the text while it is generated.

python -m posenc_jax.generate runs/NAME --prompt "def main("
python -m posenc_jax.generate runs/NAME --prompt "def main(" --temperature 0.8 --top_p 0.95 --seed 1 --tokens 500
python -m posenc_jax.generate runs/NAME --prompts FILE > generated.jsonl

A file of prompts has one per line. Its output is one line of JSON per prompt, with `prompt` and `text`.
"""

import argparse
import codecs
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posenc_jax import command
from posenc_jax.errors import reason
from posenc_jax.files import read_regular
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import printable

if TYPE_CHECKING:  # jax is imported after its environment variables are checked
    import numpy as np

    from posenc_jax.config import RunConfig
    from posenc_jax.data.tokenizers import Tokenizer
    from posenc_jax.models.decoding import Decoder


@dataclass(frozen=True)
class Generator:
    """A causal model that is loaded: its settings, structure, arrays and tokenizer."""

    config: "RunConfig"
    graphdef: Any
    params: Any
    constants: Any
    tokenizer: "Tokenizer"


def load(source: str) -> Generator:
    """Load the newest checkpoint of a run, by its workdir. Raises ConfigError, WorkdirError and CheckpointError."""
    from posenc_jax.data import tokenizers, tokens
    from posenc_jax.runs import trained

    config = trained.read_config(Path(source))
    if config.masks_tokens:
        allowed = "must be True to generate text: an encoder predicts masked tokens, not the next one"
        raise ConfigError("config.model.causal", False, allowed)
    found = trained.load(Path(source))
    saved = Path(source) / "tokenizer.json"
    if saved.exists():
        tokenizer = tokenizers.load(config.data, saved.read_text(encoding="utf-8"))
    else:
        tokenizer = tokens.prepare(config.data).tokenizer
    return Generator(found.config, found.graphdef, found.params, found.constants, tokenizer)
