"""The stacks of libraries that posenc_jax runs on: the tests, each time in an environment of its own.

pip install nox
nox -s colab                as in Colab's runtimes: jax 0.7.2, flax 0.11.2    (Python 3.13 or 3.12)
nox -s python311            the newest that there are for Python 3.11
nox -s python312            the newest that there are for Python 3.12 and above
nox -s newest               whatever is newest today, so that what breaks is known before users meet it
nox -s colab -- fast        the parts that libraries are used by, in a few minutes
nox -s colab -- tests/models/test_transformer.py    or whatever pytest takes
"""

import subprocess

import nox


def _is_here(version: str) -> bool:
    try:
        return subprocess.run([f"python{version}", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


NEWER = next(filter(_is_here, ("3.13", "3.12")), "3.13")
FAST = (
    "tests/attention/test_accelerated.py",
    "tests/models/test_transformer.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_step.py::test_the_step_is_traced_once_and_eight_devices_equal_one[rope]",
    "tests/training/test_step.py::test_recurrent_models_are_trained_alike_on_eight_devices[lstm]",
    "tests/training/test_step.py::test_recomputation_changes_nothing",
)
# Where there are tests marked `torch`, which other Pythons skip: pyproject.toml installs PyTorch on Python 3.11.
NOTEBOOKS = ("tests/test_colab.py", "tests/walkthrough/test_notebook.py")
BESIDE_TORCH = ("tests/encodings", "tests/models", "tests/test_benchmarks.py")

nox.options.sessions = ("colab", "python311", "python312")
nox.options.default_venv_backend = "venv"


@nox.session(python=NEWER)
def colab(session: nox.Session) -> None:
    _install(session, "-c", ".ci/constraints/colab.txt")
    # Its libraries warn of each other, which is no fault of this project.
    warns = "-o", "filterwarnings=default"
    _test(session, *warns)
    if session.posargs == ["fast"]:
        _test(session, *warns, "-m", "slow", fast=NOTEBOOKS)


@nox.session(python="3.11")
def python311(session: nox.Session) -> None:
    _install(session, "-c", ".ci/constraints/python311.txt")
    _test(session)
    if session.posargs == ["fast"]:
        _test(session, "-m", "torch", fast=BESIDE_TORCH)


@nox.session(python=NEWER)
def python312(session: nox.Session) -> None:
    _install(session, "-c", ".ci/constraints/python312.txt")
    _test(session)
    if session.posargs == ["fast"]:  # flax will treat modules as trees by default
        _test(session, fast=("tests/models/test_transformer.py",), NNX_GRAPH_MODE="false")


@nox.session(python=NEWER)
def newest(session: nox.Session) -> None:
    _install(session, "--upgrade")
    _test(session)


def _install(session: nox.Session, *options: str) -> None:
    session.install("-r", "requirements-dev.txt", *options)
    session.run("python", "-m", "pip", "list")


def _test(session: nox.Session, *options: str, fast: tuple[str, ...] = FAST, **variables: str) -> None:
    asked = fast if session.posargs == ["fast"] else session.posargs
    variables |= {"XDG_CACHE_HOME": session.create_tmp()}
    session.run("python", "-m", "pytest", *options, *asked, env=variables)
