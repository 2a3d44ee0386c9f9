"""Manifests of checkpoints: SHA-256 checksums of all files, which show that a checkpoint is complete and intact."""

import re
from collections.abc import Callable
from pathlib import Path

from posenc_jax.files import read_sealed, sha256, write_sealed

MANIFEST = "manifest.json"
FORMAT = 1  # version of the content of a checkpoint


class CheckpointError(Exception):
    """No checkpoint can be restored, or one does not fit the run. The message says what to do."""

    exit_code = 4


def write_manifest(folder: Path) -> None:
    """Seal a complete checkpoint. The manifest is written last, and atomically."""
    write_sealed(folder / MANIFEST, {"format": FORMAT, "files": _sums(folder)})


def steps(directory: Path) -> list[int]:
    """The steps of all checkpoints in a directory, sealed or not, in increasing order."""
    names = (re.fullmatch("step_([0-9]{1,10})", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def newest_intact(directory: Path, tell: Callable[[int, str], None] | None = None) -> int | None:
    """The step of the newest intact checkpoint. None if no checkpoint was ever sealed.

    `tell` is called for each newer, damaged checkpoint, with its step and the reason. Raises CheckpointError if all are
    damaged, or if one has another format.
    """
    lost = False
    for step in reversed(steps(directory)):
        folder = directory / f"step_{step}"
        lost = lost or (folder / MANIFEST).exists()
        reason = damage(folder)
        if not reason:
            return step
        if tell is not None:
            tell(step, reason)
    if lost:
        raise CheckpointError(f"every checkpoint in {directory} was damaged; run again to start from step 0")
    return None


def damage(folder: Path) -> str | None:
    """How a checkpoint differs from its manifest; None if it is intact. Raises CheckpointError for another format."""
    try:
        manifest = read_sealed(folder / MANIFEST, {"format": int, "files": {str: str}})
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the process ended before it was written, or it was lost"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {manifest['format']}, of another release of posenc_jax")
    expected = manifest["files"]
    try:
        found = _sums(folder)
    except FileNotFoundError as error:  # the run has just removed the checkpoint
        return f"missing: {error.filename}"
    changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return f"changed: {', '.join(sorted(changed))}" if changed else None


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
