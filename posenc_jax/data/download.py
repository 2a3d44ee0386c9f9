"""Published corpora: downloaded over HTTPS, verified by checksum, and kept in the cache.

pooch is not used, because it follows redirects away from HTTPS, and saves everything that a server sends before it
compares the checksum.
"""

import hashlib
import http.client
import logging
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from posenc_jax.data import cache
from posenc_jax.errors import one_line
from posenc_jax.files import remove_abandoned, sha256
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 60  # seconds without data
_WAITS = (1, 3, 9)  # seconds before each retry
_TRANSIENT = (408, 425, 429, *range(500, 600))  # HTTP status codes after which a retry may succeed
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Archive:
    """A zip file on the web, with the size and checksum that it must have."""

    name: str
    url: str
    size: int  # bytes
    sha256: str
    members: tuple[str, ...]  # the files that are read from it
    member_size: int  # the largest number of bytes that a member may unpack to


ARCHIVES = {
    archive.name: archive
    for archive in (
        Archive(
            name="enwik8",
            url="https://mattmahoney.net/dc/enwik8.zip",
            size=36_445_475,
            sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            members=("enwik8",),
            member_size=100_000_000,
        ),
        Archive(
            name="text8",
            url="https://mattmahoney.net/dc/text8.zip",
            size=31_344_016,
            sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            members=("text8",),
            member_size=100_000_000,
        ),
        Archive(
            name="wikitext103",  # the word-level release, from the site of its first author
            url="https://wikitext.smerity.com/wikitext-103-v1.zip",
            size=190_229_076,
            sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            members=tuple(f"wikitext-103/wiki.{split}.tokens" for split in ("train", "valid", "test")),
            member_size=600_000_000,
        ),
    )
}


def read(archive: Archive, folder: Path) -> dict[str, bytes]:
    """The members of an archive by name. The archive is downloaded into `folder` unless it is there.

    The download is retried a few times if a server fails, stalls or stops early. Nothing is downloaded if
    POSENC_OFFLINE=1 is in the environment. Raises ConfigError if the file cannot be downloaded or is not the published
    one. The message says where to put the file by hand.
    """
    path = folder / archive.url.rpartition("/")[2]
    remove_abandoned(folder)
    if not path.is_file() or sha256(path) != archive.sha256:
        if is_offline():
            raise _unavailable(archive, path, "POSENC_OFFLINE is set")
        _download(archive, path)
    try:
        with zipfile.ZipFile(path) as members:
            return {name: _unpack(members, name, archive) for name in archive.members}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        problem = f"{path} must be a zip file of {', '.join(archive.members)}: {one_line(error)}"
        raise ConfigError("config.data.corpus", archive.name, problem) from error


def is_offline() -> bool:
    """Whether the environment forbids downloads."""
    return os.environ.get("POSENC_OFFLINE", "0") not in ("", "0")


class _Transient(Exception):
    """A download failed, but a retry may succeed."""


def _download(archive: Archive, path: Path) -> None:
    """Place the archive at `path` after a complete download. Retries a few times."""
    for wait in (*_WAITS, None):
        try:
            return _fetch(archive, path)
        except _Transient as error:
            if wait is None:
                raise _unavailable(archive, path, f"tried {len(_WAITS) + 1} times: {one_line(error)}") from error
            log.warning("%s: %s; trying again in %d s", archive.url, error, wait)
            sleep(wait)


def _fetch(archive: Archive, path: Path) -> None:
    """Try the download once. Raises _Transient if a retry may help."""
    log.info("downloading %s (%.0f MB) to %s", archive.url, archive.size / 1e6, path)
    size, digest = 0, hashlib.sha256()
    with cache.writing(path) as file:
        for chunk in _chunks(archive, path):
            size += len(chunk)
            if size > archive.size:
                break
            digest.update(chunk)
            file.write(chunk)
        if size < archive.size:
            raise _Transient(f"it sent {size} bytes, not {archive.size} bytes")
        if size > archive.size:
            raise _unavailable(archive, path, f"it sent more, not {archive.size} bytes")
        if digest.hexdigest() != archive.sha256:
            raise _unavailable(archive, path, f"its SHA-256 sum is {digest.hexdigest()}")


def _chunks(archive: Archive, path: Path) -> Iterator[bytes]:
    opener = urllib.request.build_opener(_SecureRedirects)
    # Some hosts refuse urllib's own user agent.
    request = urllib.request.Request(archive.url, headers={"User-Agent": "posenc_jax"})
    try:
        _check_secure(archive.url)
        with opener.open(request, timeout=_TIMEOUT) as response:
            while chunk := response.read(_CHUNK):
                yield chunk
    except _InsecureError as error:
        raise _unavailable(archive, path, one_line(error)) from error
    except HTTPError as error:
        error.close()
        if error.code in _TRANSIENT:
            raise _Transient(one_line(error)) from error
        raise _unavailable(archive, path, one_line(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(one_line(error)) from error


class _InsecureError(URLError):
    """The address is not https."""


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        _check_secure(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_secure(url: str) -> None:
    """Raise _InsecureError unless the address is https, or http on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise _InsecureError(f"{url} is not https")


def _unavailable(archive: Archive, path: Path, reason: str) -> ConfigError:
    remedy = f"get the file by other means and place it at {path}"
    return ConfigError("config.data.corpus", archive.name, f"cannot be had from {archive.url} ({reason}); {remedy}")


def _unpack(members: zipfile.ZipFile, name: str, archive: Archive) -> bytes:
    with members.open(name) as member:
        text = member.read(archive.member_size + 1)
    if len(text) > archive.member_size:
        problem = f"unpacks {name} to more than {archive.member_size} bytes"
        raise ConfigError("config.data.corpus", archive.name, problem)
    return text
