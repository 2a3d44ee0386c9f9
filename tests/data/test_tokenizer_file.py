"""A tokenizer.json of the user's own is read without loss, fills in its size, and is identified by its checksum."""

import logging

import pytest
from tokenizers import Tokenizer

from configs import rope_extrap
from posenc_jax.config import RunConfig
from posenc_jax.data import tokenizer_file, tokens
from posenc_jax.files import sha256
from posenc_jax.runs.grid import Study
from posenc_jax.schema import ConfigError
from tests.data.settings import write_books
from tests.data.test_pretrained_tokenizer import ENGLISH, bert, byte_level, sentence_piece
from tests.small import run_config


def write(path, definition):
    path.write_text(definition, encoding="utf-8")
    return path


def resolved(path, folder, **changes):
    """The settings of a run that reads tokens with this file."""
    settings = rope_extrap.get_config("size=smoke").to_dict()
    settings["data"] |= {"tokenizer": str(path), "path": str(folder / "books"), "cache_dir": str(folder / "cache")}
    settings["data"] |= changes
    return RunConfig.from_mapping(tokenizer_file.resolve(settings))


@pytest.mark.parametrize("definition", [byte_level, sentence_piece])
def test_tokens_of_a_file_are_those_of_the_library_and_their_bytes_are_exact(tmp_path, definition):
    write_books(tmp_path, 5, text=ENGLISH)
    path = write(tmp_path / "tokenizer.json", definition())
    config = resolved(path, tmp_path)
    dataset = tokens.prepare(config.data)
    assert config.data.vocab_size == len(Tokenizer.from_file(str(path)).get_vocab())
    assert config.data.tokenizer_sha256 == sha256(path)
    for split in dataset.splits.values():
        assert dataset.tokenizer.token_bytes[split.tokens].sum() == split.num_bytes > len(split.tokens)
        assert dataset.tokenizer.decode(split.tokens).decode() == ENGLISH * len(split.names)


def test_a_moved_file_is_the_same_tokenizer_and_a_changed_one_is_not(tmp_path, caplog):
    write_books(tmp_path, 5)
    path = write(tmp_path / "tokenizer.json", byte_level())
    config = resolved(path, tmp_path)
    first = tokens.prepare(config.data)
    moved = resolved(path.rename(tmp_path / "moved.json"), tmp_path)
    with caplog.at_level(logging.INFO):
        assert tokens.prepare(moved.data).fingerprint == first.fingerprint
    assert not caplog.messages  # the tokens come from the cache
    assert moved.fingerprint == config.fingerprint
    assert moved.located == {"init_from", "data.tokenizer"}
    with pytest.raises(ConfigError, match=r"config.data.tokenizer = '.*tokenizer.json': cannot be read: No such file"):
        tokens.prepare(config.data)
    write(path, byte_level() + "\n")
    with pytest.raises(
        ConfigError, match=f"tokenizer.json': must have the sha256 {config.data.tokenizer_sha256}; it has"
    ):
        tokens.prepare(config.data)
    assert resolved(path, tmp_path).fingerprint != config.fingerprint


@pytest.mark.parametrize(
    ("definition", "changes", "reason"),
    [
        (byte_level, {"vocab_size": 1024}, "config.data.vocab_size = 1024: must be 292, as .*tokenizer.json has"),
        (
            byte_level,
            {"tokenizer_sha256": "0" * 64},
            "config.data.tokenizer_sha256 = '0000.*: must be '[0-9a-f]{64}', as",
        ),
        (bert, {}, "config.data.tokenizer = '.*tokenizer.json': .*its model is WordPiece, which may lose text"),
        (lambda: "[]", {}, "tokenizer.json': the tokenizer cannot be used: it is not the JSON of a tokenizer"),
        (
            lambda: byte_level(added_tokens=[{"id": 2**40, "content": "x", "special": True}]),
            {},
            "tokenizer.json': the tokenizer cannot be used: it has 1099511627777 tokens, more than 1048576",
        ),
        (lambda: "{", {}, "tokenizer.json': the tokenizer cannot be used: Expecting"),
        (
            byte_level,
            {"tokenizer": "wordpeice"},
            "must be one of: bytes.* path of a tokenizer.json. Did you mean 'wordp",
        ),
        (byte_level, {"tokenizer": "/"}, "config.data.tokenizer = '/': must be one of"),
        (byte_level, {"tokenizer": "no.json"}, "config.data.tokenizer = 'no.json': cannot be read: No such file"),
        (byte_level, {"tokenizer": "~nobody/t.json"}, "config.data.tokenizer = '~nobody/t.json': cannot be read: "),
    ],
)
def test_a_file_that_is_no_lossless_tokenizer_or_contradicts_the_settings_is_refused(
    tmp_path, definition, changes, reason
):
    path = write(tmp_path / "tokenizer.json", definition())
    with pytest.raises(ConfigError, match=reason):
        resolved(path, tmp_path, **changes)


def test_the_checksum_is_for_files_alone():
    with pytest.raises(
        ConfigError, match=r"config.data.tokenizer_sha256 = '0+': must be '' for data.tokenizer = 'bytes'"
    ):
        run_config(data__tokenizer_sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"tokenizer_sha256 = '': must be the sha256 of this file for .* 'a.json'"):
        run_config(data__tokenizer="a.json")


def test_a_study_compares_tokenizers(tmp_path):
    paths = [write(tmp_path / f"{make.__name__}.json", make()) for make in (byte_level, sentence_piece)]
    base = rope_extrap.get_config("size=smoke").to_dict()
    sweep = {"tokens": ("data.tokenizer=bytes", *(f"data.tokenizer={path}" for path in paths))}
    study = Study.from_mapping({"name": "tokens", "base": base, "sweep": sweep})
    assert [spec.config.data.tokenizer_sha256 for spec in study.runs] == ["", *map(sha256, paths)]
    assert [spec.config.data.vocab_size for spec in study.runs][:2] == [256, 292]
