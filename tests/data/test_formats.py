"""Rows of files and datasets are documents, with exactly their text, or are refused with file, row and reason."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from posenc_jax.data import corpora, tokens
from posenc_jax.schema import ConfigError
from tests.data.settings import settings, write_books

TEXTS = [f"row {number}, naïve 😀\u2028\n" * 3 for number in range(40)]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=bool(row["id"] % 2)) + "\n" for row in ROWS).encode()


def zstd(content):
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(content)
    return stream.getvalue().to_pybytes()


def parquet(rows, **columns):
    stream = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows) if rows else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, stream, row_group_size=7)
    return stream.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES[:500]) + gzip.compress(LINES[500:]),  # as from `cat a.gz b.gz`
    "rows.jsonl.zst": zstd(LINES[:500]) + zstd(LINES[500:]),
    "rows.parquet": parquet(ROWS),
}


def write(path, content):
    path.write_bytes(content)
    return path


def found(folder, path, **changes):
    """The text of every document by name, and the names in each split."""
    splits = corpora.load(settings(folder, path=str(path), **changes)).splits
    texts = {document.name: document.text.decode() for split in splits.values() for document in split}
    return texts, {name: {document.name for document in split} for name, split in splits.items()}


@pytest.mark.parametrize("name", FILES)
def test_each_row_of_a_file_is_a_document(tmp_path, name):
    texts, splits = found(tmp_path, write(tmp_path / name, FILES[name]))
    assert texts == {f"{name}#{number}": text for number, text in enumerate(TEXTS, 1)}
    assert [bool(names) for names in splits.values()] == [True, True, True]
    assert sum(map(len, splits.values())) == len(TEXTS)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_text_is_one_document_split_by_position(tmp_path, pack):
    suffix = {gzip.compress: ".gz", zstd: ".zst"}[pack]
    config = settings(tmp_path, path=str(write(tmp_path / f"book.txt{suffix}", pack(b"\xef\xbb\xbf" + LINES))))
    splits = corpora.load(config).splits.values()
    assert b"".join(part.text for (part,) in splits) == LINES


def test_a_folder_may_hold_files_of_all_kinds_and_patterns_name_files_or_rows(tmp_path):
    books = write_books(tmp_path, 2)
    for name, content in FILES.items():
        write(books / name, content)
    texts, splits = found(tmp_path, books, validation_files=("rows.parquet",), test_files=("*.txt", "rows.jsonl#1?"))
    assert len(texts) == 2 + len(FILES) * len(TEXTS)
    assert splits["validation"] == {f"rows.parquet#{number}" for number in range(1, 41)}
    assert splits["test"] == {"book-00.txt", "book-01.txt", *(f"rows.jsonl#{number}" for number in range(10, 20))}


def test_blank_lines_and_empty_rows_are_no_documents_and_names_count_lines(tmp_path):
    content = b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": ""}\r\n{"text": "five"}\n{"text": "six"}'
    texts, _ = found(tmp_path, write(tmp_path / "a.jsonl", content))
    assert texts == {"a.jsonl#1": "one", "a.jsonl#5": "five", "a.jsonl#6": "six"}


def test_another_field_is_another_text_with_other_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", b"".join(b'{"text": "text %d", "body": "%d"}\n' % (i, i) for i in range(9)))
    made = [tokens.prepare(settings(tmp_path, path=str(path), **own)) for own in ({}, {"field": "body"})]
    assert [sum(split.num_bytes for split in dataset.splits.values()) for dataset in made] == [54, 9]
    assert made[0].fingerprint != made[1].fingerprint


def line(content):
    return {"a.jsonl": b'{"text": "first"}\n' + content}


DEEP = b'{"text": ' + b"[" * 100_000
WRONG = {
    "no field": (
        line(b'{"txet": "a", "id": 3}'),
        "field = 'text': must be .*; line 2 of .*a.jsonl has: txet, id.*'txet'",
    ),
    "no fields": (line(b"{}"), "line 2 of .*a.jsonl has: none"),
    "a number": (line(b'{"text": 3}'), "field = 'text': must be a string.* an integer in row 2 of .*a.jsonl"),
    "null": (line(b'{"text": null}'), "must be a string in each row; it is None in row 2 of .*a.jsonl"),
    "half a character": (
        line(b'{"text": "\\ud800"}'),
        "must be text that can be encoded as UTF-8.* row 2 of .*a.jsonl",
    ),
    "no object": (line(b'["text"]'), "path = .*a.jsonl': must have a JSON object in each line; line 2: it is list"),
    "no JSON": (line(b'{"text": "a" "b"}'), "line 2: Expecting ',' delimiter, column 14"),
    "too deep": (line(DEEP), "line 2: .*recursion"),
    "Latin-1": (line(b'{"text": "caf\xe9"}'), "line 2: 'utf-8' codec can't decode byte 0xe9"),
    "nothing": ({"a.jsonl": b"\n"}, "must not be empty"),
    "no rows": ({"a.parquet": parquet([], text=pyarrow.array([], "string"))}, "must not be empty"),
    "no column": ({"a.parquet": parquet([{"texts": "a"}])}, "a.parquet has: texts. Did you mean 'texts'"),
    "bytes": ({"a.parquet": parquet([{"text": b"a"}])}, "it is bytes in row 1 of .*a.parquet"),
    "no Parquet": ({"a.parquet": b"PAR1"}, "a.parquet': cannot be read: Parquet file size is 4 bytes"),
    "a cut Parquet": ({"a.parquet": FILES["rows.parquet"][:-9]}, "a.parquet': cannot be read: Parquet magic bytes"),
    "no gzip": ({"a.jsonl.gz": LINES}, "a.jsonl.gz': cannot be read: Not a gzipped file"),
    "a cut gzip": (
        {"a.txt.gz": FILES["rows.jsonl.gz"][:-9]},
        "a.txt.gz': cannot be read: Compressed file ended before",
    ),
    "no zstd": ({"a.txt.zst": LINES}, "a.txt.zst': cannot be read: ZSTD decompress failed"),
    "a cut zstd": ({"a.jsonl.zst": FILES["rows.jsonl.zst"][:-9]}, "a.jsonl.zst': cannot be read: Truncated compressed"),
    "packed Latin-1": ({"a.txt.gz": gzip.compress(b"caf\xe9 ")}, "a.txt.gz': must be UTF-8 text, .* at byte 3"),
    "a packed Parquet": ({"a.parquet.gz": b""}, "; .parquet.gz files are not read"),
}


@pytest.mark.parametrize(("files", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_no_row_of_text_is_refused(tmp_path, files, reason):
    ((name, content),) = files.items()
    with pytest.raises(ConfigError, match=f"config.data.{reason}" if reason[:5] in ("field", "path ") else reason):
        found(tmp_path, write(tmp_path / name, content))


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_damaged_file_is_refused_or_read(tmp_path, name):
    refused = 0
    for position in range(0, len(FILES[name]), len(FILES[name]) // 40):
        try:
            found(tmp_path, write(tmp_path / name, flipped(FILES[name], position)))
        except ConfigError:
            refused += 1
    assert refused


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "pyarrow")])
def test_a_missing_library_and_its_extra_are_named(tmp_path, monkeypatch, name, package):
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"needs {package}, of the extra posenc-jax\[datasets\]: pip install {package}"
    ):
        found(tmp_path, write(tmp_path / name, b""))


def test_a_name_of_the_hub_without_its_prefix_is_no_folder(tmp_path):
    with pytest.raises(
        ConfigError, match=r"does not exist; a dataset of the Hugging Face Hub is named hf://datasets/a/b"
    ):
        found(tmp_path, "a/b")


@pytest.fixture(scope="module")
def datasets():
    import datasets  # takes seconds

    return datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory, datasets):
    """Folders of `save_to_disk`: "one" without splits, and "several" with three."""
    folder, rows = tmp_path_factory.mktemp("saved"), datasets.Dataset.from_list(ROWS)
    rows.select(range(9)).with_format("numpy").save_to_disk(folder / "one")
    splits = {"train": rows.select(range(9)), "validation": rows.select([20, 10]), "test": rows.select([39])}
    datasets.DatasetDict(splits).save_to_disk(folder / "several")
    return folder


def test_rows_of_a_saved_dataset_are_documents_and_its_splits_are_kept(tmp_path, saved):
    texts, splits = found(tmp_path, saved / "one")
    assert texts == {f"one#{number}": text for number, text in enumerate(TEXTS[:9], 1)}
    texts, splits = found(tmp_path, saved / "several")
    assert texts["validation#1"] == TEXTS[20]
    assert splits["validation"] == {"validation#1", "validation#2"}
    assert splits["test"] == {"test#1"}
    assert len(splits["train"]) == 9
    _, splits = found(tmp_path, saved / "several", test_files=("train#1",))
    assert (splits["validation"], splits["test"]) == ({"validation#1", "validation#2"}, {"train#1"})
    _, splits = found(tmp_path, saved / "several", test_fraction=1.0)
    assert [len(names) for names in splits.values()] == [0, 0, 12]


def test_a_wrong_field_or_a_damaged_file_of_a_saved_dataset_is_named(tmp_path, saved):
    with pytest.raises(ConfigError, match=r"config.data.field = 'body': must be .*; split one of .* has: id, text"):
        found(tmp_path, saved / "one", field="body")
    with pytest.raises(ConfigError, match=r"it is an integer in row 1 of split one of "):
        found(tmp_path, saved / "one", field="id")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (saved / "one").iterdir():
        write(copied / file.name, file.read_bytes()[: -20 if file.suffix == ".arrow" else None])
    with pytest.raises(ConfigError, match=r"config.data.path = '.*copied': cannot be read: "):
        found(tmp_path, copied)
    write(copied / "state.json", b"{}")
    with pytest.raises(ConfigError, match=r"config.data.path = '.*copied': cannot be read: "):
        found(tmp_path, copied)


def test_a_dataset_of_the_hub_is_read_by_name_and_configuration(tmp_path, datasets, monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("a/b", "a/b:c"):
        config = settings(tmp_path, path=f"hf://datasets/{name}")
        assert corpora.load(config).name == name[2:]
    assert asked == [("hf://datasets/a/b", None), ("hf://datasets/a/b", "c")]


def test_nothing_is_downloaded_from_the_hub_offline(tmp_path, datasets, monkeypatch):
    monkeypatch.setenv("POSENC_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(
        ConfigError, match=r"config.data.path = 'hf://.*: cannot be had from .*\(POSENC_OFFLINE is set\)"
    ):
        found(tmp_path, "hf://datasets/a/b")
