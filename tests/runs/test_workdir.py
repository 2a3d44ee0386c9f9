"""A workdir belongs to one run. Other runs, and folders without a valid record of a run, are refused with a reason."""

import dataclasses
import json

import pytest

from configs import recurrent
from posenc_jax.config import RunConfig
from posenc_jax.files import sha256_of
from posenc_jax.identity import ADDED, RESUMABLE
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import flat
from tests.small import run_config

RECORD = {
    "windows": {"asked": 2, "found": 2, "documents": 1},
    "data": {"fingerprint": "f00d"},
    "versions": {"python": "3.11.7"},
}
OTHER = {"data": {"fingerprint": "beef"}, "versions": {"python": "3.12.1"}}


def test_a_run_whose_text_has_changed_is_refused_and_its_record_kept(tmp_path):
    config = run_config()
    with workdirs.claim(tmp_path, config, RECORD):
        pass
    before = (tmp_path / "config.json").read_bytes()
    with (
        pytest.raises(
            WorkdirError,
            match=r"text has changed.*fingerprint f00d \(Python 3.11.7\), this machine has beef \(Python 3.12.1\)",
        ),
        workdirs.claim(tmp_path, config, OTHER),
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
    for read in (workdirs.read, lambda path: workdirs.check(path, run_config())):
        with pytest.raises(WorkdirError, match="has format 1, of another release"):
            read(tmp_path)


LSTM = RunConfig.from_mapping(recurrent.get_config("size=smoke,cell=lstm").to_dict())


@pytest.mark.parametrize("config", [run_config(), run_config("t5"), LSTM], ids=["rope", "t5", "lstm"])
def test_a_record_without_settings_that_were_added_later_is_that_of_the_run(config, tmp_path):
    with workdirs.claim(tmp_path, config, RECORD):
        pass
    record = json.loads((tmp_path / "config.json").read_text())
    settings = record["config"]
    for field in ADDED:
        section, _, name = field.partition(".")
        settings[section].pop(name, None)  # not every model and encoding has it
    del settings["logging"]  # older records lack the section
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert RunConfig.from_mapping(workdirs.read(tmp_path)["config"]) == config
    workdirs.check(tmp_path, config)
    free = {*RESUMABLE, "init_from"} - {"training.duration"}
    older = {field: value for field, value in flat(settings).items() if field not in free}
    assert config.fingerprint == sha256_of(older)[:12]
    with pytest.raises(WorkdirError, match=r"data.field: 'text' -> 'body'"):
        workdirs.check(tmp_path, dataclasses.replace(config, data=dataclasses.replace(config.data, field="body")))


def test_a_moved_tokenizer_is_the_same_run_and_another_one_is_not(tmp_path):
    def config(path, digit):
        return run_config(data__tokenizer=path, data__vocab_size=300, data__tokenizer_sha256=digit * 64)

    with workdirs.claim(tmp_path, config("a.json", "0"), RECORD):
        pass
    workdirs.check(tmp_path, config("moved/a.json", "0"))
    with pytest.raises(WorkdirError, match=r"another config:\n  data.tokenizer_sha256: '0+' -> '1+'$"):
        workdirs.check(tmp_path, config("a.json", "1"))
    named = run_config(data__tokenizer="bpe", data__vocab_size=300)
    with pytest.raises(WorkdirError, match=r"another config:\n  data.tokenizer: 'a.json' -> 'bpe'"):
        workdirs.check(tmp_path, named)


def test_a_check_that_refuses_leaves_the_folder_and_its_lock_as_they_are(tmp_path):
    with workdirs.claim(tmp_path, run_config(), RECORD):
        pass
    (tmp_path / "lock").write_text("process 1 on elsewhere")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse():
        raise WorkdirError("as it is")

    with pytest.raises(WorkdirError, match="as it is"), workdirs.claim(tmp_path, run_config(), RECORD, refuse):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_has_ended_only_with_the_settings_asked_for(tmp_path):
    config, longer = run_config(), run_config(training__duration="4000 steps")
    start = RECORD | {"started": "now", "command": "", "device": "", "git_revision": ""}
    with workdirs.claim(tmp_path, config, start):
        workdirs.record_session(tmp_path, config, start, {"step": 0, "total_steps": 60})
        for name in workdirs.RESULTS:
            (tmp_path / name).write_text(name)
        workdirs.mark_complete(tmp_path, 60)
    ending = workdirs.ending(tmp_path, config)
    assert ending["step"] == 60
    assert workdirs.lost_files(tmp_path, ending["files"]) == []
    assert workdirs.ending(tmp_path, longer) is None
    workdirs.record_session(tmp_path, longer, start | {"started": "later"}, {"step": 60, "total_steps": 4000})
    assert workdirs.ending(tmp_path, longer) is workdirs.ending(tmp_path, config) is None
    sessions = workdirs.read(tmp_path)["sessions"]
    assert [session["step"] for session in sessions] == [0, 60]
    assert sessions[1]["changed"] == {"training.duration": ["60 steps", "4000 steps"]}
    workdirs.record_session(tmp_path, longer, start | {"started": "later"}, {"step": 90})  # from the same start
    assert workdirs.read(tmp_path)["sessions"] == sessions


@pytest.mark.parametrize("name", ["file", "a" * 300])
def test_what_can_be_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match=r"is a file, not a folder|cannot be read: File name too long"):
        workdirs.check(tmp_path / name, run_config())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match="cannot be written: Not a directory"), workdirs.lock(tmp_path / "file/own"):
        pass
