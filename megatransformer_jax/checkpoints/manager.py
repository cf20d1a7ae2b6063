"""Saves and restores train states with everything that a bit-exact resume needs."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from megatransformer_jax.checkpoints import compatibility
from megatransformer_jax.config.loop import CheckpointConfig, SavingConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.failures import SaveFailed, check_answered, fix_of, storage_problem
from megatransformer_jax.storage import (
    AnyPath,
    absolute,
    forget_listings,
    is_bucket_path,
    tree_bytes,
)

_STATE, _DATA, _RUN = "state", "data", "run"

# In place of an array that `restore_parts` is to leave out.
UNREAD = ocp.PLACEHOLDER

# A checkpoint to be deleted is renamed into here first, so that it is never seen half deleted.
_TRASH = "deleted"
# In a bucket nothing is renamed at once. Orbax's last object of a checkpoint says that it is whole.
_WHOLE = "commit_success.txt"


# ------------------------------------------------------------------------------
# Which checkpoints are kept, and which is the best.

# Under this name the loss, alone, was stored before all validation scalars were.
_OLD_LOSS = "validation_loss"
_LOSS = "validation/loss"


class Ranking(NamedTuple):
    """What makes a checkpoint better than another.

    Attributes:
      metric: name of a scalar stored with the checkpoint, such as 'validation/loss'.
      is_higher_better: otherwise a lower value is.
    """

    metric: str
    is_higher_better: bool

    @classmethod
    def from_config(cls, config: SavingConfig) -> "Ranking":
        """As `checkpoint.best_metric` and `checkpoint.best_mode` say."""
        return cls(*config.ranking)

    def cost(self, scores: Mapping[str, Any] | None) -> float:
        """Lower is better; infinity for a checkpoint without a finite score."""
        score = stored_score(scores, self.metric)
        if score is None or not math.isfinite(score):
            return math.inf
        return -score if self.is_higher_better else score

    def best(self, scores: Iterable[Mapping[str, Any] | None], count: int) -> list[int]:
        """Indices of the `count` best, best first; fewer if fewer have a finite score.

        Of equal ones the earlier is better.
        """
        costs = [(self.cost(one), index) for index, one in enumerate(scores)]
        return [index for cost, index in sorted(costs)[:count] if cost < math.inf]


@dataclasses.dataclass
class KeepBest:
    """Keeps the `count` best checkpoints (Orbax's preservation policy).

    A checkpoint without the score, or with one that is not finite, is not a candidate.
    """

    ranking: Ranking
    count: int

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> Sequence[bool]:
        """One flag per checkpoint."""
        best = self.ranking.best([info.metrics for info in checkpoints], self.count)
        return [index in best for index in range(len(checkpoints))]


class SavedCheckpoint(NamedTuple):
    """What the rules look at (as Orbax's own record of a checkpoint)."""

    step: int
    metrics: Mapping[str, Any] | None


def stored_score(scores: Mapping[str, Any] | None, metric: str) -> float | None:
    """A scalar stored with a checkpoint, or None; also of checkpoints of earlier versions."""
    scores = scores or {}
    value = scores.get(metric, scores.get(_OLD_LOSS) if metric == _LOSS else None)
    return None if value is None else float(value)


def retention_policy(config: SavingConfig) -> checkpoint_managers.AnyPreservationPolicy:
    """Keeps what any of the config's rules keeps: the last, the best, the multiples."""
    policies: list = [checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_best:
        policies.append(KeepBest(Ranking.from_config(config), config.keep_best))
    if config.keep_every_steps is not None:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def kept_steps(config: SavingConfig, checkpoints: Sequence[SavedCheckpoint]) -> set[int]:
    """Steps of the checkpoints that the rules keep.

    Args:
      config: the rules.
      checkpoints: all there are, by ascending step.
    """
    flags = retention_policy(config).should_preserve(
        checkpoints,
        context=checkpoint_managers.PreservationContext(),
    )
    return {saved.step for saved, is_kept in zip(checkpoints, flags, strict=True) if is_kept}


# ------------------------------------------------------------------------------
# The manager.


class DamagedCheckpoint(UserError):
    """A part of a checkpoint is missing or unreadable. The message names it and the fix."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    iterator_state: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run, one folder per step.

    Saves are asynchronous: `save` returns once the state may be overwritten (donated), and writing
    goes on in the background. A checkpoint appears under its name only when it is complete, so a
    process killed at any moment leaves a temporary folder at most, which the next one removes.

    Args:
      directory: where they are; made if absent.
      config: which are kept. None: for reading only. The folder must be there and is left as it
        is, so that a run may be writing to it at the same time.
      before_commit: called in the background when a save is about to become a checkpoint, by the
        process that makes it one; what it raises prevents that, and `wait` raises it.

    Raises:
      UserError: if the folder cannot be used.
      DamagedCheckpoint: if the scores of a checkpoint cannot be read.
    """

    def __init__(
        self,
        directory: AnyPath,
        config: SavingConfig | None,
        before_commit: Callable[[], None] | None = None,
    ):
        self._directory = absolute(directory)
        forget_listings(self._directory)
        self._config = config
        self._saving_step: int | None = None
        self._has_failed = False
        self._remove_trash()
        if self._directory.is_file():
            raise UserError(
                f"{self._directory} is a file, not the folder of checkpoints; put the folder back, "
                "or name another workdir."
            )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=_options(config, before_commit, is_bucket_path(self._directory)),
                item_handlers={
                    _STATE: ocp.StandardCheckpointHandler(),
                    _DATA: ocp.JsonCheckpointHandler(),
                    _RUN: ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            problem = storage_problem(error)
            raise UserError(
                f"{self._directory} cannot be used for checkpoints ({problem}); {fix_of(error)}."
            ) from error
        except ValueError as error:  # It reads the scores of all checkpoints.
            self._check_scores()
            raise error

    @property
    def directory(self) -> AnyPath:
        """Where the checkpoints are."""
        return self._directory

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def scores(self, step: int) -> dict[str, float]:
        """The validation scalars saved with a checkpoint by their names; empty if there are none.

        Checkpoints of earlier versions have 'validation_loss' alone.
        """
        return dict(self._manager.metrics(step) or {})

    def best_step(self) -> int | None:
        """Step of the best checkpoint by `ranking()`, or None if none has a finite score."""
        best = self.best_steps(self.ranking(), 1)
        return best[0] if best else None

    def best_steps(self, ranking: Ranking, count: int) -> list[int]:
        """Steps of the `count` best checkpoints, best first; fewer if fewer have a finite score."""
        steps = self.steps()
        return [steps[index] for index in ranking.best(map(self.scores, steps), count)]

    def ranking(self) -> Ranking:
        """What makes a checkpoint the best: as the config says.

        When opened for reading only it is the config saved with the newest checkpoint.
        """
        if self._config is not None:
            return Ranking.from_config(self._config)
        step = self.latest_step()
        saved = {} if step is None else self.run_info(step).get("config", {}).get("checkpoint", {})
        # Checkpoints of earlier versions do not have these options.
        names = ("best_metric", "best_mode")
        return Ranking.from_config(
            CheckpointConfig(**{name: saved[name] for name in names if name in saved})
        )

    def save(
        self,
        step: int,
        state: Any,
        iterator_state: Mapping[str, Any],
        run: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a train state; the arrays may be donated as soon as this returns.

        Args:
          step: names the checkpoint; an existing one of the same step is left as it is.
          state: pytree of arrays.
          iterator_state: of the data, JSON-able and the same in every process.
          run: JSON-able: `config` (nested dicts) and what else identifies the run.
          scores: validation scalars of exactly this state; what 'best' goes by is among them.

        Raises:
          ValueError: if the manager is for reading only.
          SaveFailed: if this save, or the one before it, cannot be written.
        """
        if self._config is None:
            raise ValueError("opened for reading only; give a CheckpointConfig to save")
        if step in self._manager.all_steps():
            return
        self.wait()
        self._saving_step = step
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(state),
                        _DATA: ocp.args.JsonSave(dict(iterator_state)),
                        _RUN: ocp.args.JsonSave(dict(run)),
                    }
                ),
                metrics=dict(scores or {}),
                force=True,
            )

    def run_info(self, step: int) -> dict[str, Any]:
        """The `run` mapping that was saved with a checkpoint.

        Raises:
          DamagedCheckpoint: if it cannot be read.
        """
        with self._reading(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()})
            )
            return restored[_RUN]

    def restore(self, abstract_state: Any, step: int) -> Restored:
        """Restores a checkpoint onto the devices that `abstract_state` names.

        Args:
          abstract_state: the train state as ShapeDtypeStructs with shardings; neither the mesh
            nor the number of processes need be those it was saved from.
          step: which checkpoint.

        Raises:
          CheckpointMismatch: if its arrays have other names or shapes.
          DamagedCheckpoint: if it cannot be read.
        """
        where = str(self._directory / str(step))
        compatibility.check_shapes(self._saved_shapes(step), tree_shapes(abstract_state), where)
        with self._reading(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardRestore(abstract_state),
                        _DATA: ocp.args.JsonRestore(),
                    }
                ),
            )
            return Restored(step, restored[_STATE], restored[_DATA])

    def restore_params(self, abstract_params: Any, step: int) -> Any:
        """Restores the parameters alone, for evaluation and generation.

        Args:
          abstract_params: the parameters as ShapeDtypeStructs with shardings.
          step: which checkpoint.

        Raises:
          CheckpointMismatch: if the saved parameters have other names or shapes.
          DamagedCheckpoint: if they cannot be read.
        """
        saved = {k: v for k, v in self._saved_shapes(step).items() if k.startswith("params/")}
        wanted = {"params": abstract_params}
        compatibility.check_shapes(saved, tree_shapes(wanted), str(self._directory / str(step)))
        return self._read_parts(wanted, step)["params"]

    def restore_parts(self, abstract_state: Any, step: int) -> Any:
        """Restores some arrays of the state; the others are not read.

        Args:
          abstract_state: the state as it was saved, with ShapeDtypeStructs with shardings for what
            is wanted and `UNREAD` for everything else.
          step: which checkpoint.

        Returns:
          The same tree with arrays, and `UNREAD` where it was.

        Raises:
          CheckpointMismatch: if wanted arrays have other names or shapes.
          DamagedCheckpoint: if they cannot be read.
        """
        wanted = tree_shapes(jax.tree.map(lambda x: None if x is UNREAD else x, abstract_state))
        saved = {name: shape for name, shape in self._saved_shapes(step).items() if name in wanted}
        compatibility.check_shapes(saved, wanted, str(self._directory / str(step)))
        return self._read_parts(abstract_state, step)

    def prune(self, config: SavingConfig, *, is_dry_run: bool = False) -> dict[int, int]:
        """Deletes the checkpoints that no rule of `config` keeps; never the newest.

        Args:
          config: the rules: keep_last, keep_best, keep_every_steps, best_metric, best_mode.
          is_dry_run: deletes nothing.

        Returns:
          Bytes on disk by step of each deleted checkpoint.

        Raises:
          ValueError: if the manager is for reading only and it is not a dry run.
        """
        saved = [SavedCheckpoint(step, self.scores(step)) for step in self.steps()]
        kept = kept_steps(config, saved)
        sizes = {
            one.step: tree_bytes(self._directory / str(one.step))
            for one in saved
            if one.step not in kept
        }
        if is_dry_run:
            return sizes
        if self._config is None:
            raise ValueError("opened for reading only; give a CheckpointConfig to delete")
        for step in sizes:
            self._delete(step)
        self.wait()
        return sizes

    def wait(self) -> None:
        """Waits until every save is on disk and removes what is no longer kept.

        Raises:
          SaveFailed: if a save could not be written, such as for a full disk.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._delete_unkept()
        self._remove_trash()

    def join(self) -> None:
        """Waits for the present save like `wait`, but from a thread that only watches it."""
        thread = self._manager._finalize_thread.get()
        if thread is not None:
            thread.join()

    def check(self) -> None:
        """Raises what went wrong with a save in the background; waits for none.

        Raises:
          SaveFailed: see `wait`.
        """
        thread = self._manager._finalize_thread.get()
        if thread is not None and not thread.is_alive():
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves and for the removal of temporary folders, and releases the manager.

        Raises:
          SaveFailed: see `wait`; not a second time.
        """
        try:
            if not self._has_failed:
                self.wait()
        finally:
            # What else fails is of the same cause, which has been told.
            with contextlib.suppress(Exception) if self._has_failed else contextlib.nullcontext():
                # Orbax waits for it when it saves but not here; where nothing was saved, the exit
                # of Python would cut it off, with a traceback on stderr.
                self._manager._maybe_await_cleanup_tmp_directory()
                self._manager.close()

    def _read_parts(self, wanted: Any, step: int) -> Any:
        with self._reading(step), ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                self._directory / str(step) / _STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )

    def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        with self._reading(step):
            return tree_shapes(self._manager.item_metadata(step)[_STATE])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one line what could not be saved, why, and what is whole."""
        try:
            yield
        except UserError:  # Of `before_commit`.
            self._has_failed = True
            raise
        except Exception as error:
            self._has_failed = True
            problem = storage_problem(error)
            if problem is None:
                raise
            step = self._saving_step
            name = "checkpoints" if step is None else f"the checkpoint of step {step}"
            raise SaveFailed(
                f"{name} could not be saved in {self._directory} ({problem}). {self.way_out(error)}"
            ) from error

    def way_out(self, error: BaseException) -> str:
        """What to do about storage that failed, and where the run goes on, as sentences."""
        thread = self._manager._finalize_thread.get()
        is_unsure = self._has_failed or (thread is not None and thread.is_alive())
        whole = [
            step
            for step in self.steps()
            if not (is_unsure and step == self._saving_step)
            if (self._directory / str(step)).exists()
        ]
        then = (
            f"it resumes from step {whole[-1]}, the newest whole checkpoint."
            if whole
            else "there is no whole checkpoint now, and without one it starts afresh."
        )
        fix = fix_of(error)
        return f"{fix[0].upper()}{fix[1:]}, then start the same command again: {then}"

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says which checkpoint is damaged where Orbax would name a missing key or a bad byte."""
        try:
            yield
        except Exception as error:
            check_answered(str(self._directory / str(step)), error)
            # Orbax raises a bare Exception where an array's bytes are missing.
            is_bare = type(error) is Exception and isinstance(error.__cause__, _DAMAGES)
            if not (is_bare or isinstance(error, _DAMAGES)):
                raise
            raise self._damaged(step, self.steps(), error) from error

    def _damaged(
        self, step: int, steps: Iterable[int], error: BaseException
    ) -> "DamagedCheckpoint":
        """The error that names a checkpoint and the way out."""
        earlier = [other for other in sorted(steps) if other < step]
        then = f"resume from step {earlier[-1]}" if earlier else "start afresh"
        # The text of a KeyError is the repr of its argument.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(text).split())[:200]
        return DamagedCheckpoint(
            f"the checkpoint {self._directory / str(step)} is damaged ({reason}); delete that "
            f"folder to {then}."
        )

    def _check_scores(self) -> None:
        """Names the checkpoint whose scores cannot be read."""
        steps = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
        for step in steps:
            file = self._directory / str(step) / "metrics" / "metrics"
            try:
                if file.exists():
                    json.loads(file.read_text())
            except ValueError as error:
                raise self._damaged(step, steps, error) from error

    def _delete_unkept(self) -> None:
        """Deletes from a bucket what no rule keeps. In folders Orbax does."""
        if self._config is None or not is_bucket_path(self._directory):
            return
        saved = [SavedCheckpoint(step, self.scores(step)) for step in self.steps()]
        for step in sorted({one.step for one in saved} - kept_steps(self._config, saved)):
            self._delete(step)

    def _delete(self, step: int) -> None:
        if is_bucket_path(self._directory) and jax.process_index() == 0:
            # Without it the checkpoint counts as unfinished; the next start removes what is left.
            (self._directory / str(step) / _WHOLE).unlink(missing_ok=True)
        self._manager.delete(step)

    def _remove_trash(self) -> None:
        if self._config is None or is_bucket_path(self._directory):
            return
        trash = self._directory / _TRASH
        if jax.process_index() == 0 and trash.exists():
            shutil.rmtree(trash, ignore_errors=True)
            logging.debug("removed old checkpoints in %s", trash)


# What reading a checkpoint raises that lacks a file, a part of one, or a byte.
_DAMAGES = (KeyError, ValueError, OSError)


def _options(
    config: SavingConfig | None, before_commit: Callable[[], None] | None, is_in_bucket: bool
) -> ocp.CheckpointManagerOptions:
    # Orbax stores and reads metrics only with `best_fn`; what is kept is up to the policy.
    metrics: dict[str, Any] = {"best_fn": _unused, "best_mode": "min"}
    if config is None:
        # Temporary folders may be of a run that is saving now. (Orbax's own `read_only` warns of
        # every option that it overrules.)
        return ocp.CheckpointManagerOptions(create=False, cleanup_tmp_directories=False, **metrics)
    # In a bucket `_delete_unkept` says which are deleted, and in which order of objects.
    deleting: dict[str, Any] = {"enable_background_delete": True}
    if not is_in_bucket:
        deleting = {"preservation_policy": retention_policy(config), "todelete_subdir": _TRASH}
    return ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=before_commit,
            # Where a folder cannot be made in the background, Orbax's threads wait for it for five
            # minutes, and the process with them.
            create_directories_asynchronously=False,
        ),
        **deleting,
        **metrics,
    )


def _unused(metrics: Mapping[str, Any]) -> float:
    raise AssertionError("Orbax was not to choose by metrics")


def tree_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape per leaf, by its path: {'params/core/kernel': (64, 64)}.

    Dicts, dataclasses and the metadata of a checkpoint give the same paths.
    """
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shapes["/".join(map(_key_name, path))] = tuple(leaf.shape)
    return shapes


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
