"""Invalid arguments, environment variables and config paths of the command are reported."""

import subprocess
import sys

import pytest
from absl import flags

import launch as launch_py
from posenc_jax.schema import ConfigError
from tests.test_launch import RECIPE, ROOT, command, environment, launch


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # used by ml_collections
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "must name a file"),
        (["--config=configs/none.py"], "--config = 'configs/none.py': must be a file, seen from here or from "),
        (["--config=configs/rope_extra.py", "--config.seed=1"], "Did you mean 'configs/rope_extrap.py'?"),
        (["--config", "configs/none.py:size=smoke", "--config.seed=1"], "--config = 'configs/none.py': must be a file"),
        (["--config=FOLDER/reads.py", "--config.seed=1"], "No such file or directory: 'nothing'"),
        (["--config=configs/rope_extrap.py:size=huge"], "must be one of: default, smoke"),
        (["--config=configs/rope_extrap.py:encoding=alibbi"], "Did you mean 'alibi'"),
        (["--config=configs/rope_extrap.py:size=smoke,size=base"], "each KEY once"),
        ([RECIPE, "--confg=x"], "Did you mean"),
        ([RECIPE, "--config.encoding.bas=3"], "config.encoding.bas = '3': no such field; the fields here are: base, "),
        ([RECIPE, "--config.model.num_layer=3"], "Did you mean 'num_layers'"),
        ([RECIPE, "--config.optimizer.clip_norm=2"], "clip_norm = '2': this field is now named 'grad_clip_norm'"),
        ([RECIPE, "--together"], "--together = 'given': this flag is now named --stack_runs"),
        ([RECIPE, "--part=2"], "--part = 'given': this flag is now named --shard"),
        ([RECIPE, "--config.lr=3"], "config.lr = '3': no such field; the fields here are: data, encoding"),
        ([RECIPE, "--undefok=lr", "--lr=3"], "no flag may be unknown"),
        ([RECIPE, "--config.encoding.name=alibi"], "encoding=NAME"),
        ([RECIPE, "config.seed=2"], "with the dashes"),
        ([RECIPE, "--config.model.qk_norm", "False"], "'False': is not a flag"),
        ([RECIPE, "--config.seed=1", "--config.seed=2"], "must be given once"),
        ([RECIPE, "--config.model.qk_norm", "--noconfig.model.qk_norm"], "must be given once"),
        ([RECIPE, "--config.evaluation.lengths=(64,)", "--config.evaluation.lengths=(128,)"], "must be given once"),
        ([RECIPE, "--flagfile=FOLDER/repeated.flags"], "--config.seed = 'given 2 times'"),
        ([RECIPE, "--config.training.length=-5"], "at least 2"),
        ([RECIPE, "--config.training.length=True"], "config.training.length = 'True': must be an integer"),
        ([RECIPE, "--config.training.length=long"], "config.training.length = 'long': must be an integer"),
        ([RECIPE, "--config.training.length=64.0"], "config.training.length = '64.0': must be an integer"),
        ([RECIPE, "--config.model.qk_norm=maybe"], "config.model.qk_norm = 'maybe': must be True or False"),
        ([RECIPE, "--config.model=3"], "config.model = '3': must be a section"),
        ([RECIPE, "--config.optimizer.learning_rate=nan"], "finite"),
        ([RECIPE, "--config.evaluation.lengths=(64,128.5)"], "lengths[1] = 128.5: must be an integer"),
        ([RECIPE, "--config.evaluation.lengths={32:64}"], "config.evaluation.lengths = '{32:64}': must be a tuple"),
        (
            [RECIPE, "--config.evaluation.lengths", "{64, 32}"],
            "config.evaluation.lengths = '{64, 32}': must be a tuple",
        ),
        ([RECIPE, "--config.evaluation.lengths=b'ab'"], "must be a tuple"),
        ([RECIPE, "--shard=1"], "is for studies"),
        (["--config=FOLDER/no_sweep.py"], "config.sweep = None: is missing."),
        ([RECIPE, "--stack_runs"], "is for studies"),
        ([RECIPE, "--submit=cluster=local"], "is for studies"),
        ([RECIPE, "--workdir="], "must name a folder"),
        ([RECIPE, "--workdir=a\nb"], "must name a folder"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, reason, tmp_path, monkeypatch):
    (tmp_path / "reads.py").write_text("def get_config():\n    open('nothing')")
    study = "import ml_collections\nfrom configs import rope_extrap\ndef get_config():\n"
    study += "    return ml_collections.ConfigDict({'name': 'a', 'base': rope_extrap.get_config()})"
    (tmp_path / "no_sweep.py").write_text(study)
    (tmp_path / "repeated.flags").write_text("--config.seed=1\n--config.seed=2\n")
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    with pytest.raises(ConfigError) as refused:
        read_flags(arguments, monkeypatch)
    assert refused.value.exit_code == 2
    assert reason in str(refused.value)


def read_flags(arguments, monkeypatch):
    """`launch.read_flags` as in a new process: absl's flags are global, and config_flags adds one for each override."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])  # config_flags looks for overrides here
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
        else:
            flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    return launch_py.read_flags(arguments)


def test_a_wrong_argument_is_told_before_anything_is_written(cache, tmp_path):
    work = tmp_path / "work"
    ran = launch(tmp_path / "cache", RECIPE, "--config.training.length=-5", f"--workdir={work}")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: config.training.length = -5: must be at least 2")
    assert ran.stderr.count("\n") == 1
    assert not work.exists()
    assert not (tmp_path / "cache").exists()


def test_variables_that_jax_cannot_work_with_end_with_2_and_one_line(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = "--config=experiments/rope_base.py:size=smoke"
    for config, name, value in (
        (RECIPE, "JAX_PLATFORMS", "CPU"),
        (study, "JAX_PLATFORMS", "CPU"),
        (RECIPE, "JAX_DISABLE_JIT", "1"),
    ):
        ran = subprocess.run(
            command(config, f"--workdir={tmp_path / 'work'}"),
            env=environment(cache) | {name: value},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.startswith(f"error: {name} = '{value}': must ")
        assert ran.stderr.count("\n") == 1
        assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("config", ["configs/rope_extrap.py:size=smoke", "experiments/rope_base.py:size=smoke"])
def test_a_config_file_of_the_project_is_found_from_any_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch_py._find_config_file(["--config", config, "--workdir=x"]) == [
        f"--config={ROOT / config}",
        "--workdir=x",
    ]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rope_extrap.py").touch()
    found = launch_py._find_config_file([f"--config={config}"])
    assert found == [f"--config={config if config.startswith('configs') else ROOT / config}"]


def test_a_workdir_without_a_name_that_can_be_shown_is_refused(cache):
    ran = launch(cache, RECIPE, "--workdir=\udcff")
    assert ran.returncode == 2
    assert "must name a folder" in ran.stderr


def test_help_says_how_and_exits_0(cache):
    ran = launch(cache, "--help")
    assert ran.returncode == 0
    assert "--config=configs/rope_extrap.py" in ran.stdout
