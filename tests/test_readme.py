"""What README and CONTRIBUTING show is so."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.layer import algorithm
from posenc_jax.catalogue import Facts
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Dims
from posenc_jax.reporting.readme import BEGIN, END, STUDY, with_headline
from posenc_jax.results import MemberRow, write_results, write_rows
from tests.reporting.rows import learned_results, results

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
both = pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
DIMS = Dims(d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, max_length=64)


def test_the_table_of_encodings_is_that_of_the_code():
    section = README.split("## Encodings")[1].split("###")[0]
    for name in encodings.names():
        facts = Facts.of(name)
        dependent, relative = ("yes" if fact else "no" for fact in (facts.data_dependent, facts.relative))
        cells = f"`{name}`", facts.acts_on, facts.learns, dependent, relative, facts.algorithm, facts.source
        assert f"| {' | '.join(cells)} |" in section.splitlines()
    assert section.count("| `") == len(encodings.names())
    for rule in frequencies.RULES:
        assert f"`{rule}`" in section


def test_the_example_of_an_own_encoding_works():
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert source.count("\n") < 40
    namespace = {"__name__": "example"}
    exec(source, namespace)
    cls = namespace["LogDecay"]
    encoding = cls(cls.Config(), DIMS, nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 20, 2, 8)) for key in keys)
    positions, nothing = jnp.arange(20)[None], (None, None)
    outputs = [algorithm(encoding, length)(encoding, q, k, v, positions, positions, nothing) for length in (10, 10**6)]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    bias = encoding.bias(q, q, None, positions, positions, nothing)
    np.testing.assert_allclose(bias[0, :, 19, 0], -np.log1p(np.e) * np.log(20), rtol=1e-5)


def test_the_headline_is_that_of_the_results():
    if BEGIN not in README:
        pytest.skip("the study of the headline is not complete yet")
    assert with_headline(README, ROOT) == README


def test_a_headline_is_written_between_the_marks_and_a_readme_without_them_refused(tmp_path):
    study = tmp_path / STUDY
    study.mkdir(parents=True)
    write_results(study / "results.csv", [*results(), *learned_results()])
    members = [
        MemberRow(name, seed, "", 1, 1.0, None, "", "", "", 64, 64, 30, "")
        for name in ("rope", "learned")
        for seed in (0, 1)
    ]
    write_rows(study / "members.csv", MemberRow, members)
    written = with_headline(f"# Title\n{BEGIN}| old |\n{END}rest\n", tmp_path)
    assert written.startswith(f"# Title\n{BEGIN}Trained on 256 tokens")
    assert written.endswith(f"{END}rest\n")
    for expected in ("means over 2 seeds", "| rope | 1.850 ± 0.010 |", "beyond its table", f"]({STUDY}/figures/"):
        assert expected in written.replace("*", "")
    assert "ntk" not in written
    assert "| old |" not in written
    with pytest.raises(ValueError, match="must have the lines"):
        with_headline("# Title\n", tmp_path)


@both
def test_tensorboard_listens_to_this_machine_alone(text):
    shown = re.findall(r"^ *tensorboard .*$", text, re.MULTILINE)
    assert shown
    for command in shown:
        assert "--host localhost" in command
        assert "--bind_all" not in command


@both
def test_every_recipe_and_file_it_names_exists(text):
    parts = "configs|experiments|benchmarks|posenc_jax|tests|docs"
    paths = re.findall(rf"(?<![\w/])(?:{parts})/(?:[\w/.-]*\w/?)?", text)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
