"""What happens between steps: the protocol, and when a hook is due.

Validation, samples, checkpoints and whatever else a run does besides stepping arrive in the loop
as hooks, so that the loop knows none of them and training never imports evaluation.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from absl import logging

from megatransformer_jax.training.state import TrainState


@runtime_checkable
class Hook(Protocol):
    """Called after every `every_steps` steps.

    Attributes:
      every_steps: interval; 0 for never.
      at_end: also called after the last step of the run.
      at_stop: also called when the run stops early because it was asked to.
      skips_bad_steps: not called after a step whose update was skipped because it was not finite,
        unless the run ends or stops there.
    """

    every_steps: int
    at_end: bool
    at_stop: bool
    skips_bad_steps: bool

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Acts on the state.

        Args:
          step: steps done so far.
          state: the train state after them. It is donated to the next step: do not keep it.
          scalars: what the hooks before this one returned after the same step.

        Returns:
          Numbers to write under their names; empty if there are none.
        """


def is_due(hook: Hook, step: int, *, is_last: bool, is_stopping: bool) -> bool:
    """Whether `hook` is to be called after `step`."""
    regular = hook.every_steps > 0 and step % hook.every_steps == 0
    return regular or (is_last and hook.at_end) or (is_stopping and hook.at_stop)


class CheckpointHook:
    """Saves the state, with the validation scalars of the same step if there are any.

    While steps are skipped the parameters stay those of the last good step, so nothing is saved:
    the newest checkpoint remains one that a repaired run can go on from. At the end and at a stop
    it is saved all the same, for the position in the data.

    Args:
      every_steps: steps between saves; the last step and an early stop are saved too.
      save: called with (step, state, validation scalars by name).
    """

    at_end = True
    at_stop = True
    skips_bad_steps = True

    def __init__(
        self, every_steps: int, save: Callable[[int, TrainState, Mapping[str, float]], None]
    ):
        self.every_steps = every_steps
        self._save = save

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Starts the save; it ends in the background."""
        scores = {name: v for name, v in scalars.items() if name.startswith("validation/")}
        self._save(step, state, scores)
        return {}


class SampleHook:
    """Shows samples of the model and writes them as text.

    Args:
      every_steps: steps between samples; 0: never.
      make_samples: from (state, step) to texts by name.
      write_texts: called with (step, texts by name).
    """

    at_stop = False
    skips_bad_steps = False

    def __init__(
        self,
        every_steps: int,
        make_samples: Callable[[TrainState, int], Mapping[str, str]],
        write_texts: Callable[[int, Mapping[str, str]], None],
    ):
        self.every_steps = every_steps
        self.at_end = every_steps > 0
        self._make_samples = make_samples
        self._write_texts = write_texts

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Generates, logs and writes the samples."""
        texts = self._make_samples(state, step)
        for name, text in texts.items():
            logging.info("sample %s after step %d: %s", name, step, text)
        self._write_texts(step, texts)
        return {}
