"""Texts and how they are split: Python's own library, local files, and standard corpora."""

import fnmatch
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from posenc_jax.config import DataConfig
from posenc_jax.data import download
from posenc_jax.schema import ConfigError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".csv", ".json", ".jsonl", ".html", ".xml")  # read in a folder
NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text, which no window of tokens leaves."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    name: str
    splits: dict[str, list[Document]]


def load(config: DataConfig) -> Corpus:
    """The documents of `config.path` if it is given, else of `config.corpus`. Raises ConfigError."""
    if config.path:
        path = Path(config.path).expanduser()
        return Corpus(path.name, _local(path, config))
    readers: dict[str, Callable[[DataConfig], dict[str, list[Document]]]] = {
        "stdlib": _standard_library,
        "enwik8": _hundred_million_bytes,
        "text8": _hundred_million_bytes,
        "wikitext103": _wikitext103,
    }
    return Corpus(config.corpus, readers[config.corpus](config))


def _standard_library(config: DataConfig) -> dict[str, list[Document]]:
    """Source text of the running Python's library: a file stays in its split in every Python that has it."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _files(root, lambda folder: folder not in NO_LIBRARY):
        if path.suffix == ".py":
            text = path.read_bytes()
            if _invalid_byte(text) is None and text:
                documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        allowed = f"needs the source text of Python's library, of which {root} has none; give data.path instead"
        raise ConfigError("config.data.corpus", config.corpus, allowed)
    return _split_by_name(documents, config)


def _local(path: Path, config: DataConfig) -> dict[str, list[Document]]:
    if not path.exists():
        near = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError("config.data.path", config.path, "does not exist", near)
    if path.is_file():
        return _split_by_position([_read(path, path.name, config)], config)
    found = [file for file in _files(path, lambda folder: not folder.startswith(".")) if file.suffix in SUFFIXES]
    documents = [_read(file, file.relative_to(path).as_posix(), config) for file in found]
    documents = [document for document in documents if document.text]
    if not documents:
        raise ConfigError("config.data.path", config.path, "holds no text in files named " + ", ".join(SUFFIXES))
    if len(documents) < len(SPLITS):
        return _split_by_position(documents, config)
    return _split_by_name(documents, config)


def _files(root: Path, enter: Callable[[str], bool]) -> list[Path]:
    """Regular files below `root` in the order of their names; links to folders are not followed."""
    files = []
    for folder, names, children in os.walk(root):
        names[:] = filter(enter, names)
        files += [Path(folder, child) for child in children if Path(folder, child).is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path, name: str, config: DataConfig) -> Document:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError("config.data.path", config.path, f"cannot be read: {error}") from None
    text = text.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    position = _invalid_byte(text)
    if position is not None:
        raise ConfigError("config.data.path", config.path, f"must be UTF-8 text, which {name} is not at byte {position}")
    if not text and path == Path(config.path).expanduser():
        raise ConfigError("config.data.path", config.path, "is empty")
    return Document(name, text)


def _invalid_byte(text: bytes) -> int | None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _split_by_name(documents: list[Document], config: DataConfig) -> dict[str, list[Document]]:
    """Whole documents to splits, by the patterns of the config or else by a hash of their names."""
    names = [document.name for document in documents]
    patterns = {"test": config.test_files, "validation": config.validation_files}
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, own in patterns.items():
        for pattern in own:
            if not fnmatch.filter(names, pattern):
                allowed = f"must each match a document; {pattern!r} matches none of {len(names)}"
                raise ConfigError(f"config.data.{split}_files", pattern, allowed, names)
    for document in documents:
        splits[_split_of(document.name, config)].append(document)
    for split, own in patterns.items():
        if not splits[split] and not own:  # few documents: the hash may leave a split without one
            splits["train"].sort(key=lambda document: _share(document.name))
            splits[split].append(splits["train"].pop(0))
    for split, members in splits.items():
        if not members:
            raise ConfigError("config.data", [*config.validation_files, *config.test_files], f"leaves {split} empty")
        members.sort(key=lambda document: document.name)
    return splits


def _split_of(name: str, config: DataConfig) -> str:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    if matches(config.test_files):
        return "test"
    if matches(config.validation_files):
        return "validation"
    share = _share(name)
    if not config.test_files and share < config.test_fraction:
        return "test"
    if not config.validation_files and share >= 1 - config.validation_fraction:
        return "validation"
    return "train"


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _split_by_position(documents: list[Document], config: DataConfig) -> dict[str, list[Document]]:
    """The start of each document to train, then validation, then test, cut between characters."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        size = len(document.text)
        cuts = [0, size * (1 - config.validation_fraction - config.test_fraction), size * (1 - config.test_fraction), size]
        cuts = [_character_start(document.text, int(cut)) for cut in cuts]
        for split, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            splits[split].append(Document(f"{document.name}:{start}-{stop}", document.text[start:stop]))
    return splits


def _character_start(text: bytes, position: int) -> int:
    while position < len(text) and text[position] & 0b1100_0000 == 0b1000_0000:
        position += 1
    return position


def _hundred_million_bytes(config: DataConfig) -> dict[str, list[Document]]:
    """enwik8 and text8: 90, 5 and 5 million bytes, by convention."""
    (text,) = download.members(config.corpus, config.cache_path).values()
    cuts = {"train": slice(0, 90_000_000), "validation": slice(90_000_000, 95_000_000), "test": slice(95_000_000, None)}
    return {split: [Document(f"{config.corpus}-{split}", text[cut])] for split, cut in cuts.items()}


def _wikitext103(config: DataConfig) -> dict[str, list[Document]]:
    """WikiText-103's own splits, one document for each article."""
    texts = download.members("wikitext103", config.cache_path)
    return {split: _articles(split, text) for split, text in zip(SPLITS, texts.values(), strict=True)}


def _articles(split: str, text: bytes) -> list[Document]:
    starts = [match.start() for match in re.finditer(rb"^ = [^=\n]+ = \n", text, re.MULTILINE)]
    pieces = [text[start:stop] for start, stop in zip([0, *starts], [*starts, len(text)], strict=True)]
    return [Document(f"{split}-{i}", piece) for i, piece in enumerate(pieces) if piece.strip()]
