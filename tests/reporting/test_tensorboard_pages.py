"""TensorBoard's own pages of a run, in a browser: run it by `pytest -m slow`; it prints where the screenshots are."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image

from posenc_jax.runs.finish import VARIED
from tests.test_launch import launch

SIZE = "--window-size=1400,1000"
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory):
    """The address of a TensorBoard server that shows two runs."""
    folder = tmp_path_factory.mktemp("shown")
    for base in ("1e4", "1e6"):
        settings = ["--config=configs/rope_extrap.py:size=smoke", f"--config.encoding.base={base}"]
        ran = launch(cache, *settings, f"--workdir={folder / base}")
        assert ran.returncode == 0, ran.stderr
    command = [sys.executable, "-m", "tensorboard.main", "--host=localhost", "--port=0", f"--logdir={folder}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://localhost:\d+/", line)))
        process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["scalars", "hparams", "text", "images"])
def test_a_tab_is_drawn(tab, server, tmp_path):
    """What it shows is in shadow trees, so a person has to look at the screenshot."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: on Debian, apt-get install chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *QUIET, SIZE]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000"]
    screenshot = tmp_path / f"{tab}.png"
    subprocess.run([*command, f"--screenshot={screenshot}", f"{server}#{tab}"], capture_output=True, timeout=120)
    print(screenshot)
    with Image.open(screenshot) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.slow
def test_training_comes_first_and_hyperparameters_are_few(server):
    def served(path):
        with urllib.request.urlopen(f"{server}data/plugin/{path}") as answer:
            return json.load(answer)

    tags = {tag for run in served("scalars/tags").values() for tag in run}
    assert sorted(tag.partition("/")[0] for tag in tags)[0] == "train"
    infos = served('hparams/experiment?request={"experimentName":""}')["hparamInfos"]
    assert {info["name"] for info in infos} == set(VARIED)
