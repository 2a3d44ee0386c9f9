"""A fixture for the tests of runs of several processes."""

import pytest


@pytest.fixture(scope="session")
def pair(cache, tmp_path_factory):
    """The workdir of an uninterrupted run of two processes."""
    from tests.distributed.test_hosts import ran, said

    workdir = tmp_path_factory.mktemp("pair") / "run"
    (code, output, errors), (other_code, other_output, other_errors) = ran(cache, workdir, 2)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "step 30/30" in output
    assert (errors, said(other_output), other_errors) == ("", "", "")
    return workdir
