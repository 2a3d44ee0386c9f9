"""Checkpoints: orbax, each sealed by a manifest of sha256 sums that is verified before it is restored."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from posenc_jax import hosts
from posenc_jax.files import replace_text, sha256, sha256_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1  # of what a checkpoint holds


class CheckpointError(Exception):
    """No checkpoint can be restored, or one does not fit the run; the message says what to do."""

    exit_code = 4


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were."""

    exit_code = 1


class Checkpoints:
    """The checkpoints of a run: the last ones and the one of least validation loss, written in the background.

    Each is sealed when it is complete. One that is not, as the process died in between, counts as damaged: the one
    before it is used, so `keep_last` should be 2 at least. Of many processes each writes its part, and the first one
    seals, verifies and sets aside.
    """

    def __init__(self, directory: Path, keep_last: int):
        self._directory = directory
        self._validation_losses: dict[int, float] = {}
        keep = _LastAndBest(keep_last, self._validation_losses)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, step_prefix="step", cleanup_tmp_directories=True
        )
        handlers = {"state": _TellingHandler(self._tell), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(OSError, ValueError):  # what is damaged is told when it is restored
                self._validation_losses[step] = _read_manifest(self._folder(step))["validation_loss"]
        self._sealer = ThreadPoolExecutor(1)
        self._sealed: Future[None] | None = None
        self._step = 0  # the last one
        self._failed: Future[None] = Future()  # done when this process could not write its part

    def save(self, step: int, state: Any, meta: dict[str, Any], validation_loss: float) -> None:
        """Begin to save, once the save before has ended; raises SaveError if that one or the beginning failed."""
        self.wait()
        args = ocp.args.Composite(
            state=_Save(state),
            meta=ocp.args.JsonSave(meta | {"leaves": _leaves(state)}),
        )
        self._validation_losses[step] = validation_loss
        self._step = step
        with self._writing(step):
            if not self._manager.save(step, args=args):
                raise CheckpointError(f"{self._directory} holds a checkpoint of step {step} or later")
        self._sealed = self._sealer.submit(self._seal, step)

    @property
    def last_step(self) -> int | None:
        return self._manager.latest_step()

    def wait(self) -> None:
        """Return when the last save is complete and sealed; raises SaveError if it failed."""
        if self._sealed is not None:
            done, _ = wait((self._sealed, self._failed), return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """State of the newest intact checkpoint, shaped and placed as `like`, and its meta; None if there is none.

        A damaged one is reported and set aside, and the one before it is used. Raises CheckpointError if all are
        damaged, or if one is of another model or format.
        """
        step = hosts.decided(self._newest_intact)
        if not hosts.leads():
            self._manager.reload()  # without what the first process has set aside
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["leaves"] != _leaves(like):
            raise CheckpointError(f"checkpoint {self._folder(step)} is of a model with other arrays")
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore = ocp.args.Composite(state=_Restore(template))
        return self._manager.restore(step, args=restore)["state"], meta

    def close(self) -> None:
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def _newest_intact(self) -> int | None:
        lost = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            lost = lost or (self._folder(step) / MANIFEST).exists()
            reason = damage(self._folder(step))
            if not reason:
                return step
            logger.warning("checkpoint %s is damaged (%s); it is now in %s", step, reason, self._set_aside(step))
        if lost:
            raise CheckpointError(f"every checkpoint in {self._directory} was damaged; run again to start from step 0")
        return None

    def _seal(self, step: int) -> None:
        with self._writing(step):
            self._manager.wait_until_finished()  # until all processes have written their parts
            if hosts.leads():
                write_manifest(self._folder(step), self._validation_losses[step])

    def _tell(self, error: Exception) -> None:
        try:
            with self._writing(self._step):
                raise error
        except Exception as told:
            self._failed.set_exception(told)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a ValueError is what orbax makes of a full disk
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            saved = f"the checkpoint of step {step} could not be written to {self._directory}: {reason}"
            raise SaveError(f"{saved}; those before it are kept, and the same command goes on from there") from error

    def _set_aside(self, step: int) -> Path:
        damaged = self._directory.with_name("damaged")
        damaged.mkdir(exist_ok=True)
        kept = damaged / f"step_{step}-{time.time_ns()}"
        self._folder(step).rename(kept)
        self._manager.reload()
        return kept

    def _folder(self, step: int) -> Path:
        return self._directory / f"step_{step}"


class _TellingHandler(ocp.StandardCheckpointHandler):
    """Tells at once of an error in writing; orbax, of many processes, first waits ten minutes for all to be done."""

    def __init__(self, tell: Callable[[Exception], None]):
        super().__init__()
        self._tell = tell

    async def async_save(self, *args: Any, **options: Any) -> Any:
        return [_Told(future, self._tell) for future in await super().async_save(*args, **options) or ()]


@ocp.args.register_with_handler(_TellingHandler, for_save=True)
class _Save(ocp.args.StandardSave):
    """Arguments of a save by it."""


@ocp.args.register_with_handler(_TellingHandler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """Arguments of a restoration by it."""


@dataclass(frozen=True)
class _Told:
    """A future of orbax that tells if it fails."""

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


@dataclass(frozen=True)
class _LastAndBest:
    """Which checkpoints orbax keeps when it saves another."""

    keep_last: int
    validation_losses: Mapping[int, float]  # by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min(reversed(steps), key=lambda step: self.validation_losses.get(step, math.inf))
        return [step in (*steps[-self.keep_last :], best) for step in steps]


def _leaves(state: Any) -> dict[str, Any]:
    """Shape and type of each array by its path: what must agree for a checkpoint to fit."""
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def write_manifest(folder: Path, validation_loss: float) -> None:
    """Seal a complete checkpoint. The manifest is written last and at once, so that one which is there is whole."""
    content = {"format": FORMAT, "validation_loss": validation_loss, "files": _sums(folder)}
    replace_text(folder / MANIFEST, json.dumps({"content": content, "sha256": sha256_of(content)}, indent=1))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says; raises OSError, or ValueError if it is damaged."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("sha256") != sha256_of(manifest.get("content")):
        raise ValueError
    return manifest["content"]


def damage(folder: Path) -> str | None:
    """What differs from the manifest, if anything. Raises CheckpointError if it is of another format."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the process ended before it was written, or it was lost"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {manifest['format']}, of another release of posenc_jax")
    expected = manifest["files"]
    found = _sums(folder)
    changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return f"changed: {', '.join(sorted(changed))}" if changed else None


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
