"""Checkpoints, written by orbax. Each has a manifest of SHA-256 checksums, which is verified before it is restored."""

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from posenc_jax.distributed import hosts
from posenc_jax.errors import reason
from posenc_jax.files import place_aside, read_sealed, sha256, sha256_of, write_sealed
from posenc_jax.untrusted import check_form, damaged_if_invalid, read_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1  # version of the content of a checkpoint


class CheckpointError(Exception):
    """No checkpoint can be restored, or one does not fit the run. The message says what to do."""

    exit_code = 4


class SaveError(Exception):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""

    exit_code = 1


class Checkpoints:
    """The newest checkpoints of a run, written in the background.

    A complete checkpoint is sealed with a manifest. An unsealed checkpoint counts as damaged, because the process died
    before the seal. The previous checkpoint is then used, so `keep_last` should be at least 2. With several processes,
    each process writes its part. Process 0 seals and verifies checkpoints, and moves damaged ones aside.

    This class is for the process that owns the run: it removes unfinished checkpoints of earlier processes. Other
    processes use `read_newest`.
    """

    def __init__(self, directory: Path, keep_last: int):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, step_prefix="step", cleanup_tmp_directories=True)
        handlers = {"state": _TellingHandler(self._tell), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=options)
        self._sealer = ThreadPoolExecutor(1)
        self._sealed: Future[None] | None = None
        self._step = 0  # step of the last save
        self._failed: Future[None] = Future()  # done if this process could not write its part

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Start a save, after the previous one has ended. Raises SaveError if that save or this start failed."""
        self.wait()
        args = ocp.args.Composite(state=_Save(state), meta=ocp.args.JsonSave(meta | {"leaves": _leaves(state)}))
        self._step = step
        with self._writing(step):
            if not self._manager.save(step, args=args):
                raise CheckpointError(f"{self._directory} holds a checkpoint of step {step} or later")
        self._sealed = self._sealer.submit(self._seal, step)

    def wait(self) -> None:
        """Wait until the last save is complete and sealed. Raises SaveError if it failed."""
        if self._sealed is not None:
            done, _ = wait((self._sealed, self._failed), return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The state and meta of the newest intact checkpoint. None if there is no checkpoint.

        The state gets the shapes and shardings of `like`. A damaged checkpoint is reported and moved aside, and the
        previous one is used. Raises CheckpointError if all are damaged, or if one has another model or format.
        """
        step = hosts.on_leader(functools.partial(newest_intact, self._directory, self._set_aside))
        self._manager.reload()  # forget the checkpoints that were moved aside
        return None if step is None else _load(self._folder(step), like)

    def close(self) -> None:
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def _seal(self, step: int) -> None:
        with self._writing(step):
            self._manager.wait_until_finished()  # for the parts of all processes
            if hosts.is_leader():
                write_manifest(self._folder(step))

    def _tell(self, error: Exception) -> None:
        try:
            with self._writing(self._step):
                raise error
        except Exception as told:
            with contextlib.suppress(InvalidStateError):  # another part of this process failed first
                self._failed.set_exception(told)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # orbax raises ValueError if the disk is full
            saved = f"the checkpoint of step {step} could not be written to {self._directory}: {reason(error)}"
            raise SaveError(f"{saved}; those before it are kept, and the same command goes on from there") from error

    def _set_aside(self, step: int, cause: str) -> None:
        kept = place_aside(self._folder(step), self._directory.with_name("damaged"))
        self._folder(step).rename(kept)
        logger.warning("checkpoint %s is damaged (%s); it is now in %s", step, cause, kept)

    def _folder(self, step: int) -> Path:
        return self._directory / f"step_{step}"


def read_newest(
    directory: Path, like: Any, entries: Collection[str] | None = None
) -> tuple[Any, dict[str, Any]] | None:
    """Like `Checkpoints.restore`, for a run that another process may be training. Changes nothing on disk.

    If the other process removes the checkpoint during the read, the newest one is read instead. Only the given
    `entries` of the state, such as "params", are read; by default all.
    """
    while True:
        listed, step = steps(directory), None
        try:
            step = hosts.on_leader(functools.partial(newest_intact, directory))
            return None if step is None else _load(directory / f"step_{step}", like, entries)
        except Exception:
            removed = steps(directory) != listed or (step is not None and damage(directory / f"step_{step}"))
            if hosts.count() > 1 or not removed:
                raise


def read_step(directory: Path, step: int, like: Any, entries: Collection[str] | None = None) -> Any:
    """The state of one checkpoint, or some `entries` of it, with the shapes of `like`. Raises CheckpointError."""
    if reason := damage(directory / f"step_{step}"):
        raise CheckpointError(f"checkpoint {directory / f'step_{step}'} is damaged ({reason})")
    return _load(directory / f"step_{step}", like, entries)[0]


def checksum(directory: Path, step: int) -> str:
    """The sha256 of the checksums of a checkpoint, wherever its folder is. Raises OSError and DamagedError."""
    return sha256_of(read_sealed(directory / f"step_{step}" / MANIFEST, {"files": {str: str}})["files"])


def check_step(step: Any, total: int, directory: Path) -> int:
    """Return the step of a checkpoint. Raises CheckpointError if a run of `total` steps does not have this step."""
    if not isinstance(step, int) or not 0 <= step <= total:
        raise CheckpointError(f"{directory} holds a checkpoint of step {step}, but the run has only {total} steps")
    return step


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


def _load(folder: Path, like: Any, entries: Collection[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """The state, or some `entries` of it, and the meta of a checkpoint. Raises CheckpointError.

    The state gets the shapes and shardings of `like`.
    """
    folder = folder.absolute()
    meta = read_json(folder / "meta" / "metadata")  # written by JsonCheckpointHandler; its reader has no limits
    with damaged_if_invalid(folder):
        check_form(meta, {"leaves": dict})
    if meta["leaves"] != _leaves(like):
        raise CheckpointError(f"checkpoint {folder} is of a model with other arrays")
    wanted = {name: own for name, own in like.items() if entries is None or name in entries}
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    options = {"restore_args": ocp.checkpoint_utils.construct_restore_args(template), "partial_restore": True}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(folder / "state", args=ocp.args.PyTreeRestore(template, **options)), meta
    except Exception as error:  # orbax and tensorstore raise many kinds of errors for foreign files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"checkpoint {folder} cannot be restored: {reason}") from error


class _TellingHandler(ocp.StandardCheckpointHandler):
    """Reports a write error at once. With several processes, orbax alone first waits ten minutes for all of them."""

    def __init__(self, tell: Callable[[Exception], None]):
        super().__init__()
        self._tell = tell

    async def async_save(self, *args: Any, **options: Any) -> Any:
        return [_Told(future, self._tell) for future in await super().async_save(*args, **options) or ()]


@ocp.args.register_with_handler(_TellingHandler, for_save=True, for_restore=True)  # orbax requires both
class _Save(ocp.args.StandardSave):
    """Save arguments for `_TellingHandler`."""


@dataclass(frozen=True)
class _Told:
    """An orbax future that also reports its error."""

    future: Any
    tell: Callable[[Exception], None]

    def cancel(self) -> Any:
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except Exception as error:
            self.tell(error)
            raise


def _leaves(state: Any) -> dict[str, Any]:
    """The shape and dtype of each array, by path. A checkpoint fits only if they are equal."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
