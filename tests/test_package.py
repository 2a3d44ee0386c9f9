"""The installed package: every module with its types, the same version everywhere, and complete documentation."""

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import posenc_jax
from experiments import address
from posenc_jax import encodings

ROOT = Path(__file__).parent.parent
SOURCES = "README.md", "LICENSE", "pyproject.toml", "requirements.txt", "launch.py"
COSTS = "experiments/results/benchmarks/encodings.csv"  # read by the study of many encodings
FOLDERS = "posenc_jax", "configs", "experiments"
# Builds the model of a recipe, and parses the flags of a study.
USED = """
import launch, posenc_jax
from configs import rope_extrap
from flax import nnx
import jax.numpy as jnp
from posenc_jax.config import RunConfig
from posenc_jax.models.transformer import Transformer

config = RunConfig.from_mapping(rope_extrap.get_config("size=smoke").to_dict())
model = Transformer(config.model, config.encoding, vocab_size=64, max_length=32, rngs=nnx.Rngs(0))
study, _ = launch.read_flags(["--config=experiments/length_extrapolation.py"])
print(model(jnp.ones((1, 32), int)).shape, study.name)
print(launch.__file__, rope_extrap.__file__, posenc_jax.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that pip builds, from a copy, because the build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "figures"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").iterdir()
    return zipfile.ZipFile(built)


def test_a_wheel_has_every_module_and_recipe_and_the_mark_that_it_is_typed_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert files == modules | {"launch.py", "posenc_jax/py.typed", COSTS}


def test_recipes_and_studies_work_outside_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", USED]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result, files = ran.stdout.splitlines()
    assert result == "(1, 32, 64) length_extrapolation"
    assert all(path.startswith(str(tmp_path / "site")) for path in files.split())


def test_a_wheel_asks_for_what_the_requirements_and_extras_name(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == posenc_jax.__version__
    assert set(metadata.get_all("Provides-Extra")) == {"datasets", "slurm", "profile", "wandb", "hf", "docs", "dev"}
    asked = {re.split("[^A-Za-z0-9-]", text)[0] for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert asked == {re.split("[<>=]", line)[0] for line in lines if not line.startswith("#")}


def test_changelog_and_citation_are_of_this_version():
    changelog, citation = ((ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    assert re.findall(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[0] == posenc_jax.__version__
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [posenc_jax.__version__]


def test_code_installed_inside_another_checkout_has_no_git_revision(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    installed = Path(shutil.copy(ROOT / "posenc_jax" / "runs" / "driver.py", tmp_path))
    spec = importlib.util.spec_from_file_location("installed_driver", installed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._git_revision() is None
    for command in (["add", "driver.py"], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{12}", module._git_revision())


def test_every_module_is_on_one_page_of_the_reference():
    pages = [path.read_text() for path in (ROOT / "docs").rglob("*.rst")]
    described = Counter(name for page in pages for name in re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE))
    paths = [path.relative_to(ROOT) for path in (ROOT / "posenc_jax").rglob("*.py") if path.stem != "__main__"]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths} - {"posenc_jax"}
    names |= {f"experiments.recurrence.{path.stem}" for path in (ROOT / "experiments" / "recurrence").glob("*.py")}
    assert described == Counter(names)


def test_the_first_page_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text().splitlines()
    pages = {
        path.relative_to(ROOT / "docs").with_suffix("")
        for path in (ROOT / "docs").rglob("*.*")
        if path.suffix in (".md", ".rst")
    }
    assert {str(page) for page in pages} - {"index"} <= set(index)


def test_the_pages_of_encodings_name_all_of_them():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "encodings").glob("*.rst"))
    assert set(encodings.names()) <= set(re.findall("`([a-z_0-9]+)`", text))


def test_the_example_of_the_first_page_works():
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    example = {}
    exec(source, example)
    without = example["attention"](
        encodings.build("none", example["dims"], nnx.Rngs(0)), *(example[name] for name in "qkv")
    )
    assert example["out"].shape == without.shape == (1, 256, 2, 64)
    assert not jnp.allclose(example["out"], without, atol=0.1)


def test_the_address_of_the_repository_is_that_of_pyproject(tmp_path):
    for name, write in address.FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert write(text, address.address(ROOT)) == text
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "experiments").mkdir()
    shutil.move(tmp_path / "colab.ipynb", tmp_path / "experiments")
    url = "https://github.com/someone/posenc_jax"
    project = (ROOT / "pyproject.toml").read_text()
    project += f'\n[project.urls]\nRepository = "{url}"\n'
    (tmp_path / "pyproject.toml").write_text(project)
    for _ in range(2):
        address.main(tmp_path)
        assert (tmp_path / "README.md").read_text().count("github/someone/posenc_jax/blob/main/experiments/colab") == 1
        assert (tmp_path / "CITATION.cff").read_text().count(f'\nrepository-code: "{url}"\n') == 1
        cells = json.loads((tmp_path / "experiments" / "colab.ipynb").read_text())["cells"]
        assert f'REPOSITORY = "{url}"' in "".join(cells[2]["source"])
