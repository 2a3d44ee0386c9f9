"""What the tests of training share."""

import pytest

from tests.runs.small_runs import write_text


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Text to train on, and where its tokens are kept."""
    return write_text(tmp_path_factory.mktemp("data"))
