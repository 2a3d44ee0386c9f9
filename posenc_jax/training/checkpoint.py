"""Checkpoints: orbax, each sealed by a manifest of sha256 sums that is verified before it is restored."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """No checkpoint can be restored, or one does not fit the run; the message says what to do."""

    exit_code = 4


class Checkpoints:
    """The checkpoints of a run: the last ones and the one of least validation loss, written in the background."""

    def __init__(self, directory: Path, keep_last: int):
        self._directory = directory
        best = checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics["validation_loss"], reverse=True, n=1)
        keep = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep_last), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, step_prefix="step")
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any], validation_loss: float) -> None:
        """Begin to save, once the save before has ended; raises what went wrong with that one."""
        self.wait()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"leaves": _leaves(state)})
        )
        if not self._manager.save(step, args=args, metrics={"validation_loss": validation_loss}):
            raise CheckpointError(f"{self._directory} holds a checkpoint of step {step} or later")

    @property
    def last_step(self) -> int | None:
        return self._manager.latest_step()

    def wait(self) -> None:
        """Return when the last save is complete and sealed."""
        self._manager.wait_until_finished()
        for step in self._manager.all_steps():
            folder = self._folder(step)
            if not (folder / MANIFEST).exists():
                _write_manifest(folder)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """State of the newest intact checkpoint, shaped and placed as `like`, and its meta; None if there is none.

        A damaged one is reported and set aside, and the one before it is used. Raises CheckpointError if all are
        damaged, or if one is of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            damage = _damage(self._folder(step))
            if damage:
                logger.warning("checkpoint %s is damaged (%s); it is now in %s", step, damage, self._set_aside(step))
                continue
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if meta["leaves"] != _leaves(like):
                raise CheckpointError(f"checkpoint {self._folder(step)} is of a model with other arrays")
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            restore = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            return self._manager.restore(step, args=restore)["state"], meta
        if steps:
            raise CheckpointError(f"every checkpoint in {self._directory} was damaged; run again to start from step 0")
        return None

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _set_aside(self, step: int) -> Path:
        damaged = self._directory.with_name("damaged")
        damaged.mkdir(exist_ok=True)
        kept = damaged / f"step_{step}-{time.time_ns()}"
        self._folder(step).rename(kept)
        self._manager.reload()
        return kept

    def _folder(self, step: int) -> Path:
        return self._directory / f"step_{step}"


def _leaves(state: Any) -> dict[str, Any]:
    """Shape and type of each array by its path: what must agree for a checkpoint to fit."""
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _write_manifest(folder: Path) -> None:
    """Written last and at once, so that a manifest which is there is whole."""
    temporary = folder.with_name(f"{folder.name}.{MANIFEST}.tmp")
    temporary.write_text(json.dumps(_sums(folder), indent=1))
    temporary.replace(folder / MANIFEST)


def _damage(folder: Path) -> str | None:
    """What differs from the manifest; a checkpoint that was complete but not yet sealed counts as intact."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is unreadable"
    found = _sums(folder)
    changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return f"changed: {', '.join(sorted(changed))}" if changed else None


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
