"""The code on the page about user-defined models runs, and its claims about the results are correct."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "library.md"


@pytest.fixture(scope="module")
def page():
    """Run the code of the page. Returns its variables and its printed output."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    return names, printed.getvalue()


def test_one_layer_copies_with_rope_and_not_with_alibi(page):
    losses = page[0]["losses"]
    assert losses["rope"] < 0.01
    assert 3 < losses["alibi"] < 3.5


def test_every_encoding_has_a_place_in_the_model_of_the_page(page):
    names, _ = page
    tokens = names["jnp"].zeros((2, 32), int)
    for name in names["encodings"].names():
        if names["encodings"].load(name).head_factor > 1:
            assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
            continue
        model = names["Model"](name, 32, names["nnx"].Rngs(0))
        assert names["nnx"].eval_shape(model, tokens).shape == (2, 32, 32)


def test_the_error_that_the_page_shows_is_the_one_raised(page):
    (shown,) = re.findall(r"print\(error\)  # (.*)", PAGE.read_text(encoding="utf-8"))
    assert page[1] == shown + "\n"


def test_the_sizes_that_the_page_shows(page):
    names, _ = page
    assert names["last"].shape == (2, 1, 4, 16)
    assert names["logits"].shape == (1, 32, 256)
    assert names["gradient"]
