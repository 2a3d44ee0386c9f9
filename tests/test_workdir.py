"""A workdir is one run's: others are refused, and so is what is no record of a run, in words."""

import json

import pytest

from posenc_jax import workdir as workdirs
from posenc_jax.workdir import WorkdirError
from tests.small import run_config

RECORD = {"data": {"fingerprint": "f00d"}}


def test_a_run_whose_text_has_changed_is_refused_and_its_record_kept(tmp_path):
    config = run_config()
    with workdirs.claim(tmp_path, config, RECORD):
        pass
    before = (tmp_path / "config.json").read_bytes()
    with (
        pytest.raises(WorkdirError, match=r"the text that workdir .* was trained on has changed"),
        workdirs.claim(tmp_path, config, {"data": {"fingerprint": "beef"}}),
    ):
        pass
    assert (tmp_path / "config.json").read_bytes() == before
    with workdirs.claim(tmp_path, config, RECORD):
        pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", "{}", '{"config": 3, "data": {}}', '{"config": {}}', "[" * 100_000, "\0"]
)
def test_a_record_that_is_none_is_said_to_be_damaged(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"config.json is damaged"):
        workdirs.check(tmp_path, run_config())


def test_another_release_s_format_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RECORD | {"config": {}, "format": 1}))
    with pytest.raises(WorkdirError, match="has format 1, of another release"):
        workdirs.check(tmp_path, run_config())


@pytest.mark.parametrize("name", ["file", "a" * 300])
def test_what_can_be_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match=r"is a file, not a folder|cannot be read: File name too long"):
        workdirs.check(tmp_path / name, run_config())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match="cannot be written: Not a directory"), workdirs.lock(tmp_path / "file/own"):
        pass
