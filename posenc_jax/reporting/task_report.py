"""What reports say about runs on tasks: the question, and how the tables are read."""

from collections.abc import Mapping
from typing import Any

from posenc_jax.reporting.tables import escape_markdown
from posenc_jax.untrusted import check_form

TABLES = (
    "Each cell is a share and its 95 % interval: Wilson's, over samples. It does not tell how much other seeds would "
    "learn. The best of several is bold."
)
FORM = {"name": str, "min_size": int, "max_size": int, "test_sizes": [int]}


def task_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the task in the record of a run, None for a run on text. Raises ValueError for another form."""
    own = record["config"].get("task")  # which the records of earlier runs do not have
    if not own:
        return None
    check_form(own, FORM, "config.task")
    return own


def question(task: Mapping[str, Any]) -> str:
    """What a run on a task asks, after the subject "A language model"."""
    name, sizes = escape_markdown(task["name"]), f"{task['min_size']} to {task['max_size']}"
    trained = f"was trained on task **{name}**, with samples of sizes {sizes}. "
    return f"{trained}How many answers are right in samples of sizes up to {task['test_sizes'][-1]}?"
