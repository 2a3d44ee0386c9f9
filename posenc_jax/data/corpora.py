"""The texts for training and evaluation, as documents split into train, validation and test."""

import hashlib
import itertools
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from posenc_jax.config import DataConfig
from posenc_jax.data import download, formats
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SHOWN = 3  # names of skipped files in a message
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """A text. No window extends beyond it."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents by split. No document is empty. Only the test split has documents if the settings give it all text."""

    name: str
    splits: dict[str, list[Document]]

    @property
    def fingerprint(self) -> str:
        """A SHA-256 checksum of the splits, with the names and texts of their documents in order."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split} {len(self.splits[split])}\n".encode())
            for document in self.splits[split]:
                digest.update(hashlib.sha256(document.name.encode(errors="surrogateescape")).digest())
                digest.update(hashlib.sha256(document.text).digest())
        return digest.hexdigest()


def load(config: DataConfig) -> Corpus:
    """Read the corpus that the settings name. Raises ConfigError for text that cannot be read or split.

    - A file of text: its beginning is for training, followed by validation and test. It may have any suffix except
      those of compressed and structured formats that `formats` does not read.
    - A file of rows (`.jsonl` or `.parquet`): each row is a document, whose text is in the field `field`.
    - A folder: its files with one of `formats.SUFFIXES`, at any depth, named by their relative path. Hidden files and
      folders are skipped. Other files and linked folders are skipped with a warning that names them.
    - A Hugging Face dataset: each row is a document. Its splits `validation` and `test` are those of the corpus unless
      patterns name others.
    - stdlib: the source text of the running Python's standard library, without its tests.
    - enwik8, text8, wikitext103: as published, with their usual splits; downloaded once.

    `validation_files` and `test_files` are patterns of the names of held-out documents or of their files; `*` also
    matches "/". Without patterns, a hash of the name selects the split, so a document keeps its split when others are
    added or removed. If there are fewer than three documents, each is split by position, like a single file of text. If
    `test_fraction` is 1, all documents are in the test split. A byte order mark is removed.
    """
    if config.path:
        try:
            path = Path(config.path).expanduser()
            if formats.is_dataset(config.path):
                return _split(path.resolve().name, *_read_dataset(config))
            return _split(path.resolve().name, _read_path(path, config.field), config)
        except (OSError, RuntimeError) as error:  # such as a link to itself, a name too long, or an unknown user
            raise ConfigError("config.data.path", config.path, f"cannot be read: {reason(error)}") from error
    if config.corpus == "stdlib":
        return _split(f"stdlib-{sys.version_info.major}.{sys.version_info.minor}", _read_stdlib(), config)
    for split, patterns in _patterns(config).items():
        if patterns:
            problem = f"must be () for {config.corpus}, which comes split"
            raise ConfigError(f"config.data.{split}_files", patterns, problem)
    return from_archive(download.ARCHIVES[config.corpus], config.cache_path / "downloads")


def from_archive(archive: download.Archive, folder: Path) -> Corpus:
    """A published corpus. A single text is split at 90 % and 95 % of its bytes. Three texts are the three splits."""
    texts = list(download.read(archive, folder).values())
    if len(texts) == 1:
        size = len(texts[0])
        cuts = (0, size * 90 // 100, size * 95 // 100, size)
        parts = [[Document(archive.name, texts[0][start:end])] for start, end in itertools.pairwise(cuts)]
    else:
        parts = [list(_articles(text)) for text in texts]
    return Corpus(archive.name, dict(zip(SPLITS, parts, strict=True)))


def _articles(text: bytes) -> Iterator[Document]:
    """The articles of a WikiText file. A title, ` = Title = `, is between blank lines. No text is left out."""
    headings = list(re.finditer(rb"(?:(?<=\n \n)|(?<=\A \n)) = ([^=\n]+) = \n(?= \n)", text))
    starts = [0, *(heading.start() for heading in headings[1:]), len(text)]
    for heading, (start, end) in zip(headings, itertools.pairwise(starts), strict=True):
        yield Document(heading[1].decode(), text[start:end])


def _read_stdlib() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _walk(root, ".py", skipped=_NOT_STDLIB)[0]:
        text = path.read_bytes()
        # _sysconfigdata contains paths of the machine that Python was built on.
        if not path.name.startswith("_sysconfigdata") and formats.invalid_byte(text) is None:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        raise ConfigError("config.data.corpus", "stdlib", f"needs Python's source files, and {root} has none")
    return documents


def _read_path(path: Path, field: str) -> list[Document]:
    if path.is_file():
        return [Document(*found) for found in formats.read_file(path, path.name, field)]
    if not path.is_dir():
        problem = "must be a regular file or a folder" if path.exists() else "does not exist"
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            problem += f"; a dataset of the Hugging Face Hub is named {formats.HUB}{path}"
        raise ConfigError("config.data.path", str(path), problem)
    files, others = _walk(path, formats.SUFFIXES)
    kinds, left_out = ", ".join(f"*{suffix}" for suffix in formats.SUFFIXES), ""
    if others:
        examples = ", ".join(repr(other.relative_to(path).as_posix()) for other in others[:SHOWN])
        more = ", ..." if len(others) > SHOWN else ""
        left_out = f"{len(others)} left out, of other kinds or in linked folders: {examples}{more}"
    if not files:
        problem = f"must hold at least one file of {kinds}" + (f"; {left_out}" if left_out else "")
        raise ConfigError("config.data.path", str(path), problem)
    if left_out:
        log.warning("config.data.path: %d files are read, %s", len(files), left_out)
    names = {file: file.relative_to(path).as_posix() for file in files}
    return [Document(*found) for file, name in names.items() for found in formats.read_file(file, name, field)]


def _read_dataset(config: DataConfig) -> tuple[list[Document], DataConfig]:
    """The documents of a dataset, and the settings with its own splits as patterns."""
    splits = formats.read_dataset(config.path, config.field)
    if "train" in splits and config.test_fraction < 1:
        held_out = {split for split, patterns in _patterns(config).items() if split in splits and not patterns}
        config = replace(config, **{f"{split}_files": (split,) for split in held_out})
    return [Document(*found) for rows in splits.values() for found in rows], config


def _walk(
    root: Path, suffix: str | tuple[str, ...], skipped: frozenset[str] = frozenset()
) -> tuple[list[Path], list[Path]]:
    """Files with a suffix, and other files and linked folders, sorted, without hidden ones. Links are not entered."""

    def unreadable(error: OSError) -> None:
        raise ConfigError("config.data.path", str(error.filename), f"cannot be read: {error.strerror}") from error

    files, others = [], []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        others += [path for name in folders if (path := Path(folder, name)).is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            (files if path.name.endswith(suffix) and path.is_file() else others).append(path)
    files, others = (sorted(paths, key=lambda path: path.relative_to(root).as_posix()) for paths in (files, others))
    return files, others


def _patterns(config: DataConfig) -> dict[str, tuple[str, ...]]:
    return {"validation": config.validation_files, "test": config.test_files}


def _split(name: str, documents: list[Document], config: DataConfig) -> Corpus:
    documents = [document for document in documents if document.text]
    if not documents:
        raise ConfigError("config.data.path", config.path, "must not be empty")
    if config.test_fraction == 1:
        for split, patterns in _patterns(config).items():
            if patterns:
                problem = "must be () for config.data.test_fraction = 1, which puts all text into the test split"
                raise ConfigError(f"config.data.{split}_files", patterns, problem)
        return Corpus(name, {"train": [], "validation": [], "test": documents})
    if len(documents) < 3 and not any(_patterns(config).values()):
        return Corpus(name, _split_by_position(documents, config))
    return Corpus(name, _split_by_name(documents, config))


def _split_by_position(documents: list[Document], config: DataConfig) -> dict[str, list[Document]]:
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        text, size = document.text, len(document.text)
        test = _character_start(text, size - round(size * config.test_fraction))
        validation = _character_start(text, test - round(size * config.validation_fraction))
        for split, part in zip(SPLITS, (text[:validation], text[validation:test], text[test:]), strict=True):
            if not part:
                problem = f"is too short to be split: {document.name} has {size} bytes"
                raise ConfigError("config.data.path", config.path, problem)
            splits[split].append(Document(document.name, part))
    return splits


def _character_start(text: bytes, position: int) -> int:
    """The last offset up to `position` at which a UTF-8 character begins."""
    while position > 0 and text[position : position + 1] and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _split_by_name(documents: list[Document], config: DataConfig) -> dict[str, list[Document]]:
    assigned = _matched([document.name for document in documents], config)
    rest = sorted((document.name for document in documents if document.name not in assigned), key=_uniform)
    assigned |= _drawn(rest, config)
    return {split: [document for document in documents if assigned[document.name] == split] for split in SPLITS}


def _matched(names: list[str], config: DataConfig) -> dict[str, str]:
    """The split of every name that a pattern matches."""
    splits: dict[str, str] = {}
    for split, patterns in _patterns(config).items():
        for pattern in patterns:
            matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(_file_of(name), pattern)]
            if not matched:
                allowed, files = "must match the name of a document or of its file", set(map(_file_of, names))
                raise ConfigError(f"config.data.{split}_files", pattern, allowed, sorted(files))
            for name in matched:
                if splits.setdefault(name, split) != split:
                    problem = f"must not match {name!r}, which validation_files matches"
                    raise ConfigError(f"config.data.{split}_files", pattern, problem)
    return splits


def _file_of(name: str) -> str:
    """The file, or the split of a dataset, that a document is in. A row has its number behind it."""
    return re.sub(r"#[0-9]+\Z", "", name)


def _drawn(names: list[str], config: DataConfig) -> dict[str, str]:
    """The split of each name, by its hash. Only splits without patterns are filled.

    `names` are sorted by hash. An empty split gets the first name of the largest one.
    """
    patterns = _patterns(config)
    drawn: dict[str, list[str]] = {split: [] for split in SPLITS if not patterns.get(split)}
    if len(names) < len(drawn):
        split = next(split for split in patterns if patterns[split])
        problem = f"must leave at least {len(drawn)} documents, for {' and '.join(drawn)}"
        raise ConfigError(f"config.data.{split}_files", patterns[split], problem)
    test = config.test_fraction if "test" in drawn else 0
    validation = config.validation_fraction if "validation" in drawn else 0
    for name in names:
        position = _uniform(name)
        drawn["test" if position < test else "validation" if position < test + validation else "train"].append(name)
    for members in drawn.values():
        if not members:
            members.append(max(drawn.values(), key=len).pop(0))
    return {name: split for split, members in drawn.items() for name in members}


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
