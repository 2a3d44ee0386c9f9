"""The page about tasks names all of them, and its example of an own task works."""

import re
from pathlib import Path

import pytest

from posenc_jax import tasks
from tests.tasks import test_contract as contract

PAGE = (Path(__file__).parents[2] / "docs/algorithmic_tasks.md").read_text(encoding="utf-8")


def test_the_page_names_every_task():
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("## The tasks")[1], re.MULTILINE) == list(tasks.names())


@pytest.fixture
def own_task(monkeypatch):
    """The task of the page, with a row in the table. Returns its class."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace = {"__name__": "example"}
    exec(code, namespace)
    load = tasks.load
    monkeypatch.setattr(
        tasks, "load", lambda name, *field: namespace["Reverse"] if name == "reverse" else load(name, *field)
    )
    return namespace["Reverse"]


def test_the_example_of_an_own_task_keeps_the_contract(own_task):
    contract.test_the_checker_accepts_samples_and_no_other_answers("reverse", {})
    contract.test_samples_have_the_length_of_their_size_and_then_padding("reverse", {})
    contract.test_the_key_decides_the_samples("reverse")
    contract.test_sizes_and_settings_are_possible("reverse")
