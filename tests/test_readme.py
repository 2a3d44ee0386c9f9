"""Tables, examples, commands, settings and links in README, CONTRIBUTING and docs/ are correct."""

import functools
import importlib.util
import operator
import re
import shlex
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

import launch
from configs import base
from experiments import readme
from posenc_jax import tasks
from posenc_jax.attention.dispatch import algorithm
from posenc_jax.config import RunConfig
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, Dims
from posenc_jax.encodings.position_maps import METHODS
from posenc_jax.results import MemberRow, write_results, write_rows
from posenc_jax.runs.grid import Study
from posenc_jax.runs.study import run_study
from posenc_jax.schema import literal
from tests.reporting.rows import learned_results, results, row

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.rst"),
        ROOT / "experiments/README.md",
    )
}
README = PAGES["README.md"]
OWN_ENCODING, OWN_STUDY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DIMS = Dims(d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, max_length=64)
each_page = pytest.mark.parametrize("page", PAGES)


def test_readme_is_short():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("page", ["docs/encodings/overview.md", "docs/scaling_rules.md"])
def test_every_scaling_rule_is_named(page):
    assert {*frequencies.RULES, *METHODS} <= set(re.findall("`([a-z_0-9]+)`", PAGES[page]))


def test_the_example_of_an_own_encoding_works():
    assert OWN_ENCODING.count("\n") < 40
    namespace = {"__name__": "example"}
    exec(OWN_ENCODING, namespace)
    cls = namespace["LogDecay"]
    encoding = cls(cls.Config(), DIMS, nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 20, 2, 8)) for key in keys)
    positions, nothing = jnp.arange(20)[None], (None, None)
    inputs = AttentionInputs(q, k, v, positions, positions)
    outputs = [algorithm(encoding, length)(encoding, inputs, CAUSAL) for length in (10, 10**6)]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    bias = encoding.bias(q, q, None, positions, positions, nothing)
    np.testing.assert_allclose(bias[0, :, 19, 0], -np.log1p(np.e) * np.log(20), rtol=1e-5)


@pytest.fixture(scope="session")
def own_study(tmp_path_factory):
    """Save the study in README as README says. Returns its get_config."""
    assert OWN_STUDY.count("\n") < 20
    path = tmp_path_factory.mktemp("experiments") / "bases.py"
    path.write_text(OWN_STUDY)
    spec = importlib.util.spec_from_file_location("bases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def test_the_study_in_readme_trains_and_reports_paired_differences(own_study, tmp_path):
    config = own_study()
    config.sweep.seed = config.sweep.seed[:1]
    model, training, evaluation = config.base.model, config.base.training, config.base.evaluation
    model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.head_dim, model.d_ff = (
        1,
        16,
        2,
        2,
        8,
        16,
    )
    training.length, training.batch_size, training.duration, training.warmup = 16, 8, "2 steps", "1 steps"
    evaluation.lengths, evaluation.windows, evaluation.tail = (16, 32), 4, 4
    evaluation.validation_windows, evaluation.rope_scalings, evaluation.resamples = 4, ("none",), 100
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(np.random.default_rng(i).choice(list("abcd \n"), 400)))
    config.base.data.path, config.base.data.cache_dir = str(tmp_path / "text"), str(tmp_path / "cache")
    run_study(Study.from_mapping(config.to_dict()), tmp_path / "study", launched=time.monotonic())
    report = (tmp_path / "study" / "report.md").read_text()
    assert "Does RoPE with a larger base" in report
    assert re.search(r"### Difference to the baseline.*\n\| 1e6 \|", report, re.DOTALL)


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_generated_parts_of_a_page_are_those_of_the_code_and_the_results(page):
    assert readme.regenerated(page, PAGES[page], ROOT) == PAGES[page], "run python -m experiments.readme"


def test_the_figures_show_the_results_and_all_encodings():
    for path, source in readme.fingerprints().items():
        assert Image.open(ROOT / path).text["Source"] == source, f"{path}: run python -m experiments.readme"


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / readme.STUDY
    folder.mkdir(parents=True)
    differences = [
        row(metric, 256 * times, value, encoding=name, scaling=rule)
        for name, rule in (("rope", "none"), ("rope", "ntk"), ("rope", "linear"), ("learned", "none"))
        for times in (1, 2, 4)
        for metric, value in (("difference_bits_per_byte", -times / 8), ("context_gain_bits_per_byte", times / 4))
    ]
    gains = [line for line in results() if line.metric != "context_gain_bits_per_byte"]
    write_results(folder / "results.csv", [*gains, *learned_results(), *differences])
    members = [
        MemberRow(name, seed, "", 1, 1.0, None, "", "", "", 64, 64, 30, "")
        for name in ("rope", "learned")
        for seed in (0, 1)
    ]
    write_rows(folder / "members.csv", MemberRow, members)
    return tmp_path


def test_a_table_of_losses_is_written_between_the_marks(study):
    written = readme.regenerated("docs/results.md", f"# Title\n{readme.BEGIN}| old |\n{readme.END}rest\n", study)
    assert written.startswith(f"# Title\n{readme.BEGIN}`prefix` in bits per byte, after training on 256 tokens")
    assert written.endswith(f"{readme.END}rest\n")
    for expected in (
        "means over 2 seeds",
        "| rope | 1.850 ± 0.010 |",
        "beyond its table",
        f"]({'../' + readme.STUDY}/f",
    ):
        assert expected in written.replace("*", "")
    assert "ntk" not in written
    assert "| old |" not in written


def test_a_short_table_has_differences_at_every_second_length_and_the_last_gain(study, monkeypatch):
    monkeypatch.setattr(readme, "SHOWN", ("rope",))
    table = readme.short_table(study).replace("*", "")
    assert "| encoding | 256 (1x) | 1024 (4x) | context_gain, 1024 (4x) |" in table
    assert "| rope | -0.125 ± 0.010 | -0.500 ± 0.010 | +1.000 ± 0.010 |" in table
    monkeypatch.setattr(readme, "SHOWN", ("rope", "kerple"))
    with pytest.raises(ValueError, match="no difference for: kerple"):
        readme.short_table(study)


@pytest.mark.parametrize("page", readme.PAGES)
def test_a_page_without_its_marks_is_refused(page):
    for text in ("# Title\n", readme.BEGIN, readme.END):
        with pytest.raises(ValueError, match=f"{page} must have "):
            readme.regenerated(page, text, ROOT)


@each_page
def test_tensorboard_listens_to_this_machine_alone(page):
    for command in re.findall(r"^ *tensorboard .*$", PAGES[page], re.MULTILINE):
        assert "--host localhost" in command
        assert "--bind_all" not in command


@each_page
def test_every_recipe_and_file_it_names_exists(page):
    parts = "configs|experiments|benchmarks|posenc_jax|tests|docs"
    for path in re.findall(rf"(?<![\w/])(?:{parts})/(?:[\w/.-]*\w/?)?", PAGES[page]):
        own = path in ("posenc_jax/encodings/log_decay.py", "posenc_jax/tasks/reversing.py", "experiments/bases.py")
        assert own or (ROOT / path).exists(), path


@each_page
def test_every_file_it_links_to_exists(page):
    for target in re.findall(r"\]\(([^)#]+)", PAGES[page]):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def commands(text):
    """The arguments of launch.py in each command of a page; a command in quotes ends with them."""
    for found in re.findall(r"python launch\.py ([^\n#`]*)", re.sub(r"\\\n *", "", text)):
        arguments = found.strip()
        yield arguments.removesuffix('"') if arguments.count('"') % 2 else arguments


COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_config_settings_and_flags_that_exist(command, own_study):
    config = ConfigDict()
    for argument in shlex.split(command.replace("log_decay", "alibi").replace("task=reverse", "task=copy")):
        name, _, value = argument.removeprefix("--").partition("=")
        if name == "config":
            file, _, options = value.partition(":")
            module = file.removesuffix(".py").replace("/", ".")
            get_config = own_study if module == "experiments.bases" else importlib.import_module(module).get_config
            config = get_config(options) if options else get_config()
        elif name.startswith("config."):
            *sections, field = name.split(".")[1:]
            section = functools.reduce(operator.getitem, sections, config)
            assert field in section, name
            section[field] = literal(value)
        else:
            assert name in launch.flags.FLAGS, name
    if config.get("init_from"):  # open settings come from a model that is not here
        assert config.init_from in ("smollm2", "PATH/TO/Qwen3-0.6B") or config.init_from.startswith("runs/")
    else:
        if config.get("data", {}).get("tokenizer") == "tokenizer.json":  # which is not here
            config.data.tokenizer_sha256 = "0" * 64
        (Study if "sweep" in config else RunConfig).from_mapping(config.to_dict())


@each_page
def test_every_module_that_it_runs_exists(page):
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        assert importlib.util.find_spec(module), module


@each_page
def test_every_setting_that_it_names_exists(page):
    config = base.get_config()
    for name in tasks.names():
        with config.task.unlocked():
            config.task.update(base.task(name))
    sections = "|".join(name for name, value in config.items() if isinstance(value, ConfigDict) and name != "encoding")
    text = PAGES[page]
    if page == "CHANGELOG.md":  # its table starts with the old names
        text = re.sub("^[|] `[^|]*", "", text, flags=re.MULTILINE)
    for section, field in re.findall(rf"(?:`|--config\.|--config\.base\.)({sections})\.(\w+)", text):
        assert field in config[section], f"{section}.{field}"
