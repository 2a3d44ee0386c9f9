"""Texts are read completely, split the same way everywhere, and refused with a reason."""

import os

import pytest

from posenc_jax.data import corpora, formats
from posenc_jax.schema import ConfigError
from tests.data.settings import settings, write_books


def names(corpus):
    return {split: [document.name for document in documents] for split, documents in corpus.splits.items()}


def all_names(corpus):
    return sorted(name for members in names(corpus).values() for name in members)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    return corpora.load(settings(tmp_path_factory.mktemp("stdlib")))


def test_the_standard_library_is_split_by_file_near_the_fractions_asked_for(stdlib):
    counts = {split: len(documents) for split, documents in stdlib.splits.items()}
    total = sum(counts.values())
    assert total > 300
    assert 0.02 < counts["validation"] / total < 0.09
    assert 0.02 < counts["test"] / total < 0.09
    assert len(set(all_names(stdlib))) == total


def test_the_standard_library_is_read_without_tests_and_installed_packages(stdlib):
    assert "json/decoder.py" in all_names(stdlib)
    folders = {folder for name in all_names(stdlib) for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any("_sysconfigdata" in name for name in all_names(stdlib))


def test_a_library_file_keeps_its_split_for_ever(stdlib):
    splits = {name: split for split, members in names(stdlib).items() for name in members}
    golden = dict.fromkeys(("abc.py", "argparse.py", "asyncio/events.py"), "train")
    golden |= dict.fromkeys(("enum.py", "json/encoder.py", "timeit.py"), "validation")
    golden |= dict.fromkeys(("secrets.py", "traceback.py", "multiprocessing/connection.py"), "test")
    assert {name: splits[name] for name in golden} == golden


def test_a_missing_standard_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"config.data.corpus = 'stdlib': needs Python's source"):
        corpora.load(settings(tmp_path))


def test_a_file_keeps_its_split_when_others_come(tmp_path):
    books = write_books(tmp_path, 60)
    before = names(corpora.load(settings(tmp_path, path=str(books), test_fraction=0.2)))
    for number in range(40):
        (books / f"new-{number}.txt").write_text("new")
    after = names(corpora.load(settings(tmp_path, path=str(books), test_fraction=0.2)))
    for split in corpora.SPLITS:
        assert [name for name in after[split] if name.startswith("book")] == before[split]


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("fraction", [0.001, 0.49])
def test_no_split_of_a_few_files_is_empty(tmp_path, count, fraction):
    books = write_books(tmp_path, count)
    config = settings(tmp_path, path=str(books), test_fraction=fraction, validation_fraction=fraction)
    corpus = corpora.load(config)
    assert all(corpus.splits.values())
    assert all_names(corpus) == [f"book-{number:02}.txt" for number in range(count)]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_files_are_each_split_by_position(tmp_path, count):
    books = write_books(tmp_path, count, text="{name}" * 50)
    corpus = corpora.load(settings(tmp_path, path=str(books)))
    assert [len(documents) for documents in corpus.splits.values()] == [count] * 3
    for number in range(count):
        parts = b"".join(corpus.splits[split][number].text for split in corpora.SPLITS)
        assert parts == (books / f"book-{number:02}.txt").read_bytes()


def test_patterns_hold_out_files_of_any_depth(tmp_path):
    books = write_books(tmp_path, 6)
    (books / "deep" / "er").mkdir(parents=True)
    (books / "deep" / "er" / "book.txt").write_text("deep")
    config = settings(tmp_path, path=str(books), validation_files=("book-00.txt", "*-03*"), test_files=("deep/*",))
    split = names(corpora.load(config))
    assert split["validation"] == ["book-00.txt", "book-03.txt"]
    assert split["test"] == ["deep/er/book.txt"]
    assert split["train"] == ["book-01.txt", "book-02.txt", "book-04.txt", "book-05.txt"]


def test_patterns_for_one_split_leave_the_other_to_the_hash(tmp_path):
    books = write_books(tmp_path, 30)
    split = names(corpora.load(settings(tmp_path, path=str(books), test_files=("book-1?.txt",))))
    assert split["test"] == [f"book-1{digit}.txt" for digit in range(10)]
    assert split["validation"]
    assert not set(split["validation"]) & set(split["test"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"validation_files": ("book_01.txt",)},
            r"config.data.validation_files = 'book_01.txt'.*Did you mean 'book-01",
        ),
        ({"test_files": ("book-01.txt", "*.md")}, r"config.data.test_files = '\*.md': must match"),
        ({"validation_files": ("*1*",), "test_files": ("book-*",)}, r"must not match 'book-01.txt', which validation"),
        ({"test_files": ("*",)}, "test_files.*must leave at least 2 documents, for train and validation"),
        ({"validation_files": ("*[01].txt",), "test_files": ("*2.txt",)}, "at least 1 documents, for train"),
    ],
)
def test_wrong_patterns_are_refused(tmp_path, changes, reason):
    books = write_books(tmp_path, 3)
    with pytest.raises(ConfigError, match=reason):
        corpora.load(settings(tmp_path, path=str(books), **changes))


def test_patterns_are_refused_where_a_corpus_comes_split(tmp_path):
    with pytest.raises(ConfigError, match=r"config.data.test_files.*must be \(\) for enwik8"):
        corpora.load(settings(tmp_path, corpus="enwik8", test_files=("a",)))


def test_a_file_is_split_by_position_between_characters(tmp_path):
    text = "añ€😀" * 1000  # characters of 1, 2, 3 and 4 bytes
    for shift in range(10):
        path = tmp_path / "one.txt"
        path.write_bytes(b"x" * shift + text.encode())
        corpus = corpora.load(settings(tmp_path, path=str(path), validation_fraction=0.1, test_fraction=0.2))
        parts = [corpus.splits[split][0].text for split in corpora.SPLITS]
        assert b"".join(parts) == path.read_bytes()
        for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
            part.decode()
            assert len(part) == pytest.approx(share * len(path.read_bytes()), abs=7)


def test_bytes_are_kept_as_they_are_but_for_a_byte_order_mark(tmp_path):
    content = b"mixed\r\nline\nends\r, a NUL \0 and\ttabs" * 5
    path = tmp_path / "odd.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    corpus = corpora.load(settings(tmp_path, path=str(path)))
    assert b"".join(corpus.splits[split][0].text for split in corpora.SPLITS) == content


def test_only_visible_text_files_of_a_folder_are_read(tmp_path):
    books = write_books(tmp_path, 3)
    (books / "notes.md").write_text("notes")
    (books / "empty.txt").write_text("")
    (books / ".hidden.txt").write_text("hidden")
    (books / ".checkpoints").mkdir()
    (books / ".checkpoints" / "book-00.txt").write_text("copy")
    os.mkfifo(books / "pipe.txt")
    assert all_names(corpora.load(settings(tmp_path, path=str(books)))) == [f"book-0{i}.txt" for i in range(3)]


def test_linked_folders_are_not_entered_so_a_loop_ends(tmp_path):
    books = write_books(tmp_path, 3)
    (books / "loop").symlink_to(books, target_is_directory=True)
    (books / "itself.txt").symlink_to(books / "itself.txt")
    (books / "linked.txt").symlink_to(books / "book-00.txt")
    found = all_names(corpora.load(settings(tmp_path, path=str(books))))
    assert found == [*(f"book-0{i}.txt" for i in range(3)), "linked.txt"]


def test_what_is_left_out_of_a_folder_is_said_in_one_line(tmp_path, caplog):
    books = write_books(tmp_path, 3)
    corpora.load(settings(tmp_path, path=str(books)))
    assert not caplog.messages
    (books / "part").mkdir()
    for name in ("A.TXT", "notes.md", "part/lines.json", ".hidden.md"):
        (books / name).write_text("left out")
    (books / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(books / "pipe.txt")
    corpora.load(settings(tmp_path, path=str(books)))
    (message,) = caplog.messages
    assert message.startswith("config.data.path: 3 files are read, 5 left out")
    assert message.endswith(": 'A.TXT', 'linked', 'notes.md', ...")


def write(path, content):
    path.write_bytes(content)
    return path


def link(path, target):
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "nothing", "does not exist"),
        (lambda folder: write(folder / "empty.txt", b""), "must not be empty"),
        (lambda folder: write(folder / "mark.txt", b"\xef\xbb\xbf"), "must not be empty"),
        (lambda folder: write(folder / "two.txt", b"ab"), "too short to be split: two.txt has 2 bytes"),
        (lambda folder: write(folder / "latin.txt", b"caf\xe9 " * 9), r"latin.txt': must be UTF-8.* at byte 3"),
        (lambda folder: write(folder / "zip.bin", b"PK\x03\x04\xff\xfe"), "not at byte 4"),
        (lambda folder: folder, r"must hold at least one file of \*.txt, \*.jsonl, "),
        (lambda folder: "/dev/null", "must be a regular file or a folder"),
        (lambda folder: "/proc/uptime", "must not be empty"),
        (
            lambda folder: write(folder / "lines.json", b'[{"text": "a"}]'),
            "must be text.*; .json files are not read",
        ),
        (lambda folder: write(folder / "books.tar.GZ", b"text"), "must be text.*; .tar.GZ files are not read"),
        (lambda folder: write(folder / "A.TXT", b"a").parent, r"one file of .*; 1 left out, .*: 'A.TXT'"),
        (lambda folder: write(folder / "one.txt", b"a"), "too short to be split: one.txt has 1 bytes"),
        (lambda folder: link(folder / "itself.txt", folder / "itself.txt"), "cannot be read: Symlink loop|not exist"),
        (lambda folder: link(folder / "nowhere.txt", folder / "nothing"), "does not exist"),
        (lambda folder: folder / ("a" * 300), "cannot be read: File name too long"),
        (lambda folder: "~no-such-user/books", "cannot be read: Could not determine home directory"),
    ],
)
def test_a_path_without_usable_text_is_refused(tmp_path, make, reason):
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(ConfigError, match=f"config.data.path = .*{reason}"):
        corpora.load(settings(tmp_path, path=str(make(folder))))


def test_a_folder_that_cannot_be_looked_into_is_refused(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.is_file", refuse)
    with pytest.raises(ConfigError, match=r"config.data.path = .*: cannot be read: Permission denied"):
        corpora.load(settings(tmp_path, path=str(tmp_path)))


def test_one_long_line_is_read_whole(tmp_path):
    content = b"one line without an end, " * 100_000
    (tmp_path / "line.txt").write_bytes(content)
    corpus = corpora.load(settings(tmp_path, path=str(tmp_path / "line.txt")))
    assert b"".join(corpus.splits[split][0].text for split in corpora.SPLITS) == content


def test_a_file_name_that_is_no_utf_8_names_a_document(tmp_path):
    books = write_books(tmp_path, 4)
    with open(os.fsencode(books) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    corpus = corpora.load(settings(tmp_path, path=str(books)))
    assert "caf\udce9.txt" in all_names(corpus)
    assert len(corpus.fingerprint) == 64


def test_the_file_that_is_not_text_is_named(tmp_path):
    books = write_books(tmp_path, 4)
    (books / "book-02.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(ConfigError, match=r"book-02.txt': must be UTF-8 text, which it is not at byte 12"):
        corpora.load(settings(tmp_path, path=str(books)))


def test_an_unreadable_file_or_folder_is_refused_not_left_out(tmp_path, monkeypatch):
    books = write_books(tmp_path, 4)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(formats, "read_regular", refuse)
    with pytest.raises(ConfigError, match=r"book-00.txt': cannot be read: Permission denied"):
        corpora.load(settings(tmp_path, path=str(books)))
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"'somewhere': cannot be read: Permission denied"):
        corpora.load(settings(tmp_path, path=str(books)))


def test_the_fingerprint_covers_names_texts_and_split(tmp_path):
    books = write_books(tmp_path, 5)

    def fingerprint(**changes):
        return corpora.load(settings(tmp_path, path=str(books), **changes)).fingerprint

    one = {"validation_files": ("*3.txt",), "test_files": ("*4.txt",)}
    two = {"validation_files": ("*[23].txt",), "test_files": ("*4.txt",)}  # the same documents in the same order
    seen = [fingerprint(**one), fingerprint(**two)]
    assert fingerprint(**one) == seen[0]
    (books / "book-00.txt").write_text("another text")
    seen.append(fingerprint(**one))
    (books / "book-00.txt").rename(books / "another.txt")
    seen.append(fingerprint(**one))
    assert len(set(seen)) == 4
