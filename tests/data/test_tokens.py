"""Tokens are cached by content, verified when they are read, and computed again if damaged."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posenc_jax.config import DataConfig
from posenc_jax.data import corpora, tokens
from posenc_jax.files import sha256_of
from posenc_jax.schema import ConfigError
from tests.data.settings import settings, write_books


@pytest.fixture(params=["bytes", "bpe"])
def config(request, tmp_path):
    books = write_books(tmp_path, 6, text="Chapter one of {name}, naïve and short.\r\n" * 30)
    return settings(
        tmp_path, path=str(books), tokenizer=request.param, vocab_size={"bytes": 256, "bpe": 280}[request.param]
    )


def folder(config):
    (found,) = (config.cache_path / "tokens").iterdir()
    return found


def texts(dataset):
    """The text of every document, by split and name, decoded from its tokens."""
    return {
        (split.name, name): dataset.tokenizer.decode(split.tokens[start:end])
        for split in dataset.splits.values()
        for name, start, end in zip(split.names, split.offsets, split.offsets[1:], strict=False)
    }


def test_tokens_are_those_of_the_corpus(config):
    dataset, corpus = tokens.prepare(config), corpora.load(config)
    expected = {(split, document.name): document.text for split in corpus.splits for document in corpus.splits[split]}
    assert texts(dataset) == expected
    for split in dataset.splits.values():
        assert split.num_bytes == sum(len(document.text) for document in corpus.splits[split.name])
        assert dataset.tokenizer.token_bytes[split.tokens].sum() == split.num_bytes
        assert split.offsets.dtype == np.int64
        assert split.offsets[-1] == len(split.tokens)


def test_tokens_are_made_once(config, monkeypatch):
    first = tokens.prepare(config)
    monkeypatch.setattr(tokens, "_write", None)
    second = tokens.prepare(config)
    assert texts(first) == texts(second)
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


def test_tokens_are_mapped_read_only_and_as_small_as_the_vocabulary_allows(config):
    dataset = tokens.prepare(config)
    split = dataset.splits["train"]
    assert isinstance(split.tokens, np.memmap)
    assert split.tokens.dtype == {"bytes": np.uint8, "bpe": np.uint16}[config.tokenizer]
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 0


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    books = write_books(tmp_path, 3)
    dataset = tokens.prepare(settings(tmp_path, path=str(books), tokenizer="bpe", vocab_size=65_537))
    assert dataset.splits["test"].tokens.dtype == np.uint32
    assert texts(dataset)["train", dataset.splits["train"].names[0]].startswith(b"the text of")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "meta.json"])
def test_one_flipped_bit_anywhere_is_noticed_and_repaired(config, name, caplog):
    intact = texts(tokens.prepare(config))
    path = folder(config) / name
    content = path.read_bytes()
    for position in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert texts(tokens.prepare(config)) == intact
        assert "damaged" in caplog.text
        assert path.read_bytes() == content


def sealed(meta):
    return json.dumps({"sha256": sha256_of(meta), "meta": meta}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 100_000, b"null", b"{}", sealed(None), sealed({}), sealed({"tokenizer": "", "splits": {}})],
    ids=lambda content: content[:12].decode(),
)
def test_a_cache_of_another_form_is_made_again(config, content, caplog):
    intact = texts(tokens.prepare(config))
    (folder(config) / "meta.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert texts(tokens.prepare(config)) == intact
    assert "are made again" in caplog.text


def test_a_tokenizer_in_the_cache_that_cannot_be_used_is_learned_again(config):
    intact = texts(tokens.prepare(config))
    path = folder(config) / "meta.json"
    content = path.read_bytes()
    meta = json.loads(content)["meta"] | {"tokenizer": "{}"}
    path.write_bytes(sealed(meta))
    assert texts(tokens.prepare(config)) == intact
    assert config.tokenizer == "bytes" or path.read_bytes() == content


def test_documents_whose_names_are_no_utf_8_are_kept(tmp_path):
    books = write_books(tmp_path, 4)
    with open(os.fsencode(books) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"some text")
    for _ in range(2):
        found = texts(tokens.prepare(settings(tmp_path, path=str(books))))
        assert b"some text" in [text for (_, name), text in found.items() if name == "caf\udce9.txt"]


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "meta.json"])
def test_a_cut_or_lost_file_is_made_again(config, name):
    intact = texts(tokens.prepare(config))
    path = folder(config) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert texts(tokens.prepare(config)) == intact
    path.unlink()
    assert texts(tokens.prepare(config)) == intact
    assert path.read_bytes() == content


def test_a_write_that_died_leaves_nothing_that_is_read(config, monkeypatch):
    class DiedError(Exception):
        pass

    real = json.dumps

    def die(value, **options):
        if isinstance(value, dict):
            raise DiedError
        return real(value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", die)
        with pytest.raises(DiedError):
            tokens.prepare(config)
    assert sorted(path.name for path in folder(config).iterdir()) == ["test.bin", "train.bin", "validation.bin"]
    (folder(config) / "train.bin").write_bytes(b"half")
    assert texts(tokens.prepare(config))


def test_what_killed_processes_left_is_removed_even_if_the_tokens_are_complete(config):
    tokens.prepare(config)
    left = folder(config) / f"train.bin.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    tokens.prepare(config)
    assert {path.name for path in folder(config).iterdir()} == {
        "train.bin",
        "validation.bin",
        "test.bin",
        "meta.json",
    }


def test_the_fingerprint_changes_with_text_names_split_and_tokenizer(config):
    books = Path(config.path)

    def fingerprint(**changes):
        return tokens.prepare(DataConfig(**(vars(config) | changes))).fingerprint

    other = {"tokenizer": "bpe", "vocab_size": 270}
    held_out = {"validation_files": ("*1.txt",), "test_files": ("*2.txt",)}
    swapped = {"validation_files": ("*2.txt",), "test_files": ("*1.txt",)}
    seen = [fingerprint(), fingerprint(**other), fingerprint(**held_out), fingerprint(**swapped)]
    (books / "book-00.txt").write_text("changed")
    seen.append(fingerprint())
    (books / "book-00.txt").rename(books / "renamed.txt")
    seen.append(fingerprint())
    assert len(set(seen)) == 6
    (books / "renamed.txt").rename(books / "book-00.txt")
    assert fingerprint() == seen[4]


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    books = write_books(tmp_path, 3)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"config.data.cache_dir = .*must be a folder that can be written: Not a dir"):
        tokens.prepare(settings(tmp_path, path=str(books)))


def test_a_cache_of_a_user_who_is_not_there_is_refused(tmp_path):
    books = write_books(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"config.data.cache_dir = '~no-such-user/cache': Could not determine home"):
        tokens.prepare(settings(tmp_path, path=str(books), cache_dir="~no-such-user/cache"))


def test_a_full_disk_is_said_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    books = write_books(tmp_path, 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    config = settings(tmp_path, path=str(books))
    with pytest.raises(ConfigError, match=r"config.data.cache_dir.*No space left on device"):
        tokens.prepare(config)
    assert list(folder(config).iterdir()) == []


def test_processes_that_prepare_at_once_agree(config):
    program = (
        "import json, sys\n"
        "from posenc_jax.config import DataConfig\n"
        "from posenc_jax.data import tokens\n"
        "fields = json.loads(sys.argv[1])\n"
        "fields['validation_files'] = fields['test_files'] = ()\n"
        "sys.stdin.readline()\n"
        "print(tokens.prepare(DataConfig(**fields)).fingerprint)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, json.dumps(vars(config))]
    root = str(Path(__file__).parents[2])
    with (
        subprocess.Popen(
            command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        ) as one,
        subprocess.Popen(
            command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        ) as two,
    ):
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
        fingerprints = {process.stdout.readline().strip() for process in (one, two)}
    assert fingerprints == {tokens.prepare(config).fingerprint}
    assert not list(folder(config).glob("*.tmp"))
