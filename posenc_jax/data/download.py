"""Standard corpora: fetched over https, checked against their published sums, and put in place whole or not at all."""

import hashlib
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from posenc_jax.schema import ConfigError

LARGEST_MEMBER = 2**30  # bytes


@dataclass(frozen=True)
class Archive:
    """A zip file, its sha256, and the members to read from it, in the order train, validation, test."""

    url: str
    sha256: str
    members: tuple[str, ...]


ARCHIVES = {
    "enwik8": Archive(
        "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        ("enwik8",),
    ),
    "text8": Archive(
        "https://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        ("text8",),
    ),
    "wikitext103": Archive(
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        ("wikitext-103/wiki.train.tokens", "wikitext-103/wiki.valid.tokens", "wikitext-103/wiki.test.tokens"),
    ),
}


def members(corpus: str, cache: Path, archive: Archive | None = None) -> dict[str, bytes]:
    """The named members of a corpus's archive, which is downloaded into `cache`/downloads if it is not there.

    Raises ConfigError if it cannot be had, or is not what was published.
    """
    archive = archive or ARCHIVES[corpus]
    path = cache / "downloads" / Path(archive.url).name
    if not path.exists():
        _fetch(corpus, archive, path)
    elif _sha256(path) != archive.sha256:
        raise ConfigError("config.data.corpus", corpus, f"has another sha256 than published; delete {path}")
    texts = {}
    with zipfile.ZipFile(path) as file:
        for name in archive.members:
            if file.getinfo(name).file_size > LARGEST_MEMBER:
                raise ConfigError("config.data.corpus", corpus, f"holds {name} of more than {LARGEST_MEMBER} bytes")
            texts[name] = file.read(name)
    return texts


def _fetch(corpus: str, archive: Archive, path: Path) -> None:
    by_hand = f"if this machine is offline, put the file at {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part") as part:
        try:
            _require_https(archive.url)
            with urllib.request.urlopen(archive.url, timeout=60) as response:
                _require_https(response.url)
                while chunk := response.read(2**20):
                    part.write(chunk)
        except OSError as error:
            allowed = f"cannot be downloaded from {archive.url} ({error}); {by_hand}"
            raise ConfigError("config.data.corpus", corpus, allowed) from None
        part.flush()
        if _sha256(Path(part.name)) != archive.sha256:
            allowed = f"came from {archive.url} with another sha256 than published, so it was not kept; {by_hand}"
            raise ConfigError("config.data.corpus", corpus, allowed)
        Path(part.name).rename(path)
        Path(part.name).touch()  # for the context to delete


def _require_https(url: str) -> None:
    """Plain http is for a server on this machine only; a redirect must not leave https either."""
    if not url.startswith(("https://", "http://127.0.0.1:")):
        raise OSError(f"{url} is not https")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
