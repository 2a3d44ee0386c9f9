"""Archives are downloaded completely, verified and kept, or not at all. The server runs on this machine."""

import hashlib
import http.server
import io
import threading
import time
import zipfile
from dataclasses import replace

import pytest

from posenc_jax.data import corpora, download
from posenc_jax.data.download import Archive
from posenc_jax.schema import ConfigError


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Sends `content`, or redirects to `location`, and counts the requests.

    The announced length is `extra_length` bytes too large. Each of the first requests gets one of `faults` instead: a
    status code, or the way in which the answer ends.
    """

    content = b""
    extra_length = 0
    location = ""
    requests = 0
    faults = ()

    def handle_error(self, *_):
        pass  # the client gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        assert self.headers["User-Agent"] == "posenc_jax"  # some hosts refuse urllib's default
        if self.server.requests <= len(self.server.faults):
            self.fail(self.server.faults[self.server.requests - 1])
            return
        if self.server.location:
            self.send_response(302)
            self.send_header("Location", self.server.location)
            self.end_headers()
            return
        self.send_response(200 if self.server.content else 404)
        self.send_header("Content-Length", str(len(self.server.content) + self.server.extra_length))
        self.end_headers()
        self.wfile.write(self.server.content)

    def fail(self, fault):
        if fault == "closed":
            return
        if isinstance(fault, int):
            self.send_error(fault)
            return
        announced = len(self.server.content) if fault != "short" else len(self.server.content) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(self.server.content[: len(self.server.content) // 2])
        if fault == "silent":
            time.sleep(0.5)

    def log_message(self, *_):
        pass


@pytest.fixture
def waits(monkeypatch):
    """The delays in seconds that a download requested."""
    waited = []
    monkeypatch.setattr(download, "sleep", waited.append)
    return waited


@pytest.fixture
def server(monkeypatch, waits):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("POSENC_OFFLINE", raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(server, texts, **changes):
    """Make the server send a zip file of these texts. Returns its published archive."""
    server.content = zipped(texts)
    archive = Archive(
        name="sample",
        url=f"http://127.0.0.1:{server.server_port}/files/sample.zip",
        size=len(server.content),
        sha256=hashlib.sha256(server.content).hexdigest(),
        members=tuple(texts),
        member_size=max(len(text) for text in texts.values()),
    )
    return replace(archive, **changes)


def test_an_archive_is_downloaded_once(server, tmp_path):
    archive = published(server, {"sample": b"some text " * 1000})
    for _ in range(2):
        assert download.read(archive, tmp_path / "downloads") == {"sample": b"some text " * 1000}
        (tmp_path / "downloads" / f"sample.zip.{'0' * 16}.tmp").write_bytes(b"of a process that was killed")
    download.read(archive, tmp_path / "downloads")
    assert server.requests == 1
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["sample.zip"]


@pytest.mark.parametrize("fault", [500, 503, 429, "closed", "cut", "short", "silent"])
def test_a_server_that_fails_for_a_while_is_asked_again_after_ever_longer_waits(
    server, waits, tmp_path, fault, monkeypatch, caplog
):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    archive = published(server, {"sample": b"some text " * 1000})
    server.faults = [fault, fault]
    assert download.read(archive, tmp_path) == {"sample": b"some text " * 1000}
    assert (server.requests, waits) == (3, [1, 3])
    assert caplog.text.count("trying again in") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["sample.zip"]


@pytest.mark.parametrize("fault", [500, "closed", "cut"])
def test_a_server_that_keeps_failing_is_given_up_and_nothing_is_left(server, waits, tmp_path, fault):
    archive = published(server, {"sample": b"some text"})
    server.faults = [fault] * 99
    with pytest.raises(ConfigError, match=rf"tried 4 times: .*place it at {tmp_path / 'sample.zip'}"):
        download.read(archive, tmp_path)
    assert (server.requests, waits) == (4, [1, 3, 9])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "faults"), [({"sha256": "0" * 64}, []), ({"size": 10}, []), ({}, [404]), ({}, [403])]
)
def test_an_answer_that_will_not_change_is_not_asked_for_again(server, waits, tmp_path, changes, faults):
    archive = published(server, {"sample": b"some text"}, **changes)
    server.faults = faults
    with pytest.raises(ConfigError, match="cannot be had"):
        download.read(archive, tmp_path)
    assert (server.requests, waits) == (1, [])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_offline(server, tmp_path, monkeypatch):
    archive = published(server, {"sample": b"some text"})
    monkeypatch.setenv("POSENC_OFFLINE", "1")
    with pytest.raises(ConfigError, match=rf"POSENC_OFFLINE is set.*place it at {tmp_path / 'sample.zip'}"):
        download.read(archive, tmp_path)
    assert server.requests == 0
    (tmp_path / "sample.zip").write_bytes(server.content)
    assert download.read(archive, tmp_path) == {"sample": b"some text"}
    (tmp_path / "sample.zip").unlink()
    monkeypatch.setenv("POSENC_OFFLINE", "0")
    assert download.read(archive, tmp_path) == {"sample": b"some text"}


@pytest.mark.parametrize("content", [b"garbage", zipped({"other": b"text"}), zipped({"sample": b"text" * 99})[:-9]])
def test_an_archive_that_is_no_zip_of_its_members_is_refused(server, tmp_path, content):
    archive = published(server, {"sample": b"some text"})
    server.content = content
    archive = replace(archive, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'sample.zip'} must be a zip file of sample"):
        download.read(archive, tmp_path)


def test_damage_inside_an_archive_is_noticed(server, tmp_path):
    archive = published(server, {"sample": bytes(range(256)) * 9})
    content = bytearray(server.content)
    content[60] ^= 0xFF
    server.content = bytes(content)
    archive = replace(archive, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ConfigError, match="must be a zip file of sample"):
        download.read(archive, tmp_path)


def test_a_damaged_download_is_replaced(server, tmp_path):
    archive = published(server, {"sample": b"some text"})
    download.read(archive, tmp_path)
    content = bytearray((tmp_path / "sample.zip").read_bytes())
    content[40] ^= 1
    (tmp_path / "sample.zip").write_bytes(content)
    assert download.read(archive, tmp_path) == {"sample": b"some text"}
    assert server.requests == 2


def test_a_file_put_there_by_hand_is_used_without_a_network(server, tmp_path):
    archive = published(server, {"sample": b"some text"})
    (tmp_path / "sample.zip").write_bytes(server.content)
    assert download.read(archive, tmp_path) == {"sample": b"some text"}
    assert server.requests == 0


@pytest.mark.parametrize(
    ("changes", "extra_length", "reason"),
    [
        ({"sha256": "0" * 64}, 0, "its SHA-256 sum is [0-9a-f]{64}"),
        ({"size": 1_000_000}, 0, r"it sent \d+ bytes, not 1000000 bytes"),
        ({"size": 10}, 0, "it sent more, not 10 bytes"),
        ({"size": 1_000_000}, 500, "it sent|IncompleteRead"),  # the connection ends before the announced length
    ],
)
def test_nothing_is_left_of_a_file_that_is_not_the_published_one(server, tmp_path, changes, extra_length, reason):
    archive = published(server, {"sample": b"some text"}, **changes)
    server.extra_length = extra_length
    with pytest.raises(ConfigError, match=reason):
        download.read(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_says_where_to_put_the_file(server, tmp_path):
    archive = published(server, {"sample": b"some text"})
    for url in (archive.url, "http://127.0.0.1:1/sample.zip"):  # not found on the server; no server
        server.content = b""
        with pytest.raises(ConfigError, match=rf"config.data.corpus.*{url}.*place it at {tmp_path / 'sample.zip'}"):
            download.read(replace(archive, url=url), tmp_path)


@pytest.mark.parametrize("url", ["http://example.org/a.zip", "ftp://127.0.0.1/a.zip", "file:///etc/hostname"])
def test_only_https_is_fetched(server, tmp_path, url):
    archive = published(server, {"sample": b"some text"}, url=url)
    with pytest.raises(ConfigError, match=rf"{url} is not https"):
        download.read(archive, tmp_path)
    server.location = url
    with pytest.raises(ConfigError, match=r"is not https|not allowed"):
        download.read(published(server, {"sample": b"some text"}), tmp_path)
    assert server.requests == 1


def test_the_published_corpora_are_pinned():
    assert set(download.ARCHIVES) == {"enwik8", "text8", "wikitext103"}
    for archive in download.ARCHIVES.values():
        assert archive.url.startswith("https://")
        assert len(bytes.fromhex(archive.sha256)) == 32


def test_a_member_that_unpacks_to_more_than_it_should_is_refused(server, tmp_path):
    archive = published(server, {"sample": bytes(1_000_000)}, member_size=999_999)
    with pytest.raises(ConfigError, match="unpacks sample to more than 999999 bytes"):
        download.read(archive, tmp_path)


def test_other_members_are_not_touched(server, tmp_path):
    archive = published(server, {"sample": b"text", "../outside": b"x" * 99}, members=("sample",), member_size=4)
    assert download.read(archive, tmp_path / "downloads") == {"sample": b"text"}
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", "sample.zip"]


def test_one_text_is_cut_at_90_and_95_percent(server, tmp_path):
    text = bytes(range(200))
    corpus = corpora.from_archive(published(server, {"sample": text}), tmp_path)
    parts = [corpus.splits[split] for split in corpora.SPLITS]
    assert [[len(document.text) for document in part] for part in parts] == [[180], [10], [10]]
    assert b"".join(part[0].text for part in parts) == text


def test_three_texts_are_the_splits_in_articles(server, tmp_path):
    first = b" \n = One = \n \n Text of one . \n \n = = Section = = \n \n More , 1 = 1 . \n"
    second = b" \n = Two ( film ) = \n \n Text \n = no title = \n \n More \n \n = none either = \n End \n"
    texts = {"a/train": first + second, "a/valid": second, "a/test": first}
    corpus = corpora.from_archive(published(server, texts), tmp_path)
    for split, text in zip(corpora.SPLITS, texts.values(), strict=True):
        assert b"".join(document.text for document in corpus.splits[split]) == text
    assert [document.name for document in corpus.splits["train"]] == ["One", "Two ( film )"]
    assert [document.name for document in corpus.splits["test"]] == ["One"]
