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
    "tests/test_colab.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_step.py",
)

nox.options.sessions = ("colab", "python311", "python312")
nox.options.default_venv_backend = "venv"


@nox.session(python=NEWER)
def colab(session: nox.Session) -> None:
    # Its libraries warn of each other, which is no fault of this project.
    _test(session, "-c", ".ci/constraints/colab.txt", options=("-o", "filterwarnings=default"))


@nox.session(python="3.11")
def python311(session: nox.Session) -> None:
    _test(session, "-c", ".ci/constraints/python311.txt")


@nox.session(python=NEWER)
def python312(session: nox.Session) -> None:
    _test(session, "-c", ".ci/constraints/python312.txt")


@nox.session(python=NEWER)
def newest(session: nox.Session) -> None:
    _test(session, "--upgrade")


def _test(session: nox.Session, *installing: str, options: tuple[str, ...] = ()) -> None:
    session.install("-r", "requirements-dev.txt", *installing)
    session.run("python", "-m", "pip", "list")
    asked = FAST if session.posargs == ["fast"] else session.posargs
    session.run("python", "-m", "pytest", *options, *asked, env={"XDG_CACHE_HOME": session.create_tmp()})
