"""Kinds of diagnostics: what each measures and shows, and the hook that makes them in training."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from matplotlib.figure import Figure
from matplotlib.image import imsave

from megatransformer_jax.config.loop import DIAGNOSTIC_KINDS, RECURRENT_KINDS
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.evaluation.diagnostics import figures
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.diagnostics.measures import (
    LayerNorms,
    LayerStates,
    attention_maps,
    count_draws,
    gradient_norms,
    in_model_order,
    layer_states,
)
from megatransformer_jax.evaluation.recurrence import (
    IterationCurves,
    iteration_curves,
    spectral_radius,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, off_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import write_json
from megatransformer_jax.training.writers import MetricWriter
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# What diagnostics look at: the model, a few rows, and how deep.


@dataclasses.dataclass(frozen=True)
class Subject:
    """Made once per run by `make_subject`.

    Attributes:
      config: of the run.
      model: for rows of any number: no constraint of a mesh, XLA attention, no rematerialisation.
      rows: tokens, targets and media, the same on every device.
      mean_steps: the trained mean number of iterations; 0 without a core.
      num_steps: iterations that are shown; 0 without a core.
      sharder: of the run's parameters.
    """

    config: RunConfig
    model: MegaTransformer
    rows: Batch
    mean_steps: int
    num_steps: int
    sharder: Sharder

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled so that every process can read its whole result."""
        if self.sharder.mesh is None:
            return jax.jit(function)
        return jax.jit(function, out_shardings=self.sharder.sharding())


def make_subject(
    config: RunConfig, model: MegaTransformer, batch: Batch, sharder: Sharder
) -> Subject:
    """Takes the first `diagnostics.num_rows` rows of a global batch on the mesh."""
    plain = off_mesh(model)
    plain = plain.copy(config=dataclasses.replace(plain.config, remat="none"))
    mean_steps = config.model.recurrence.mean_steps if config.model.is_recurrent else 0
    subject = Subject(
        config=config,
        model=plain,
        rows=batch,
        mean_steps=mean_steps,
        num_steps=config.diagnostics.num_steps or 2 * mean_steps,
        sharder=sharder,
    )
    count = config.diagnostics.num_rows
    first_rows = subject.compile(lambda batch: jax.tree.map(lambda part: part[:count], batch))
    return dataclasses.replace(subject, rows=first_rows(batch))


# ------------------------------------------------------------------------------
# Kinds.

# Two digits or so; see `spectral_radius`.
POWER_ITERATIONS = 30


@dataclasses.dataclass(frozen=True)
class Moment:
    """When diagnostics are made.

    Attributes:
      params: the model's parameters.
      key_data: of the run's key, uint32 [2].
      step: steps done.
      previous: steps that were done the last time.
    """

    params: Any
    key_data: Any
    step: int
    previous: int


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a kind shows. Scalars and histograms are by name, and only finite values."""

    figure: Figure
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    histograms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# On all processes, from a moment to arrays that every process can read.
Measure = Callable[[Moment], Any]


def kinds_of(subject: Subject) -> tuple[str, ...]:
    """The kinds that the run asks for, or all that its model has."""
    if subject.config.diagnostics.kinds:
        return subject.config.diagnostics.kinds
    has_core = subject.config.model.is_recurrent
    return tuple(kind for kind in DIAGNOSTIC_KINDS if has_core or kind not in RECURRENT_KINDS)


def measurement_of(kind: str) -> str:
    """The name of the measurement that a kind shows; two of them share one."""
    return "layer_states" if kind in ("activations", "token_correlation") else kind


def build_measure(measurement: str, subject: Subject) -> Measure:
    """Compiled on first use.

    Raises:
      ValueError: for an unknown measurement.
    """
    model, config = subject.model, subject.config
    seed, depths = config.train.seed, {"mean_steps": subject.mean_steps}
    key = jax.random.key(seed)

    def of_params(function: Callable[[Any, Any], Any]) -> Measure:
        compiled = subject.compile(function)
        return lambda moment: compiled(moment.params, subject.rows)

    match measurement:
        case "gradient_norms":
            compiled = subject.compile(
                lambda params, rows, step: gradient_norms(
                    model, config, params, rows, step, num_steps=subject.mean_steps, seed=seed
                )
            )
            return lambda moment: compiled(moment.params, subject.rows, np.int32(moment.step))
        case "layer_states":
            return of_params(
                lambda params, rows: layer_states(
                    model, params, rows, num_steps=subject.num_steps, seed=seed, **depths
                )
            )
        case "attention_maps":
            return of_params(
                lambda params, rows: attention_maps(model, params, rows, seed=seed, **depths)
            )
        case "recurrence":
            return of_params(
                lambda params, rows: _curves(
                    iteration_curves(model, params, rows, subject.num_steps, key)
                )
            )
        case "spectral_radius":
            return of_params(
                lambda params, rows: spectral_radius(
                    model, params, rows, subject.num_steps, key, POWER_ITERATIONS
                )
            )
        case "depth_draws":
            return _measure_draws(subject)
    raise ValueError(f"no measurement {measurement!r}")


def _curves(curves: IterationCurves) -> dict[str, jax.Array]:
    return {
        "residual": curves.residual,
        "contraction": curves.contraction,
        "state_norm": curves.state_norm,
    }


def _measure_draws(subject: Subject) -> Measure:
    data, recurrence = subject.config.data, subject.config.model.recurrence
    length = data.sequence_length + sum(media_places(subject.config))

    def count(key_data: Any, first: Any, last: Any) -> jax.Array:
        run_key = jax.random.wrap_key_data(key_data)
        return count_draws(recurrence, run_key, first, last, data.batch_size, length)

    compiled = subject.compile(count)
    return lambda moment: compiled(
        moment.key_data, np.int32(moment.previous + 1), np.int32(moment.step)
    )


def present(kind: str, measured: Any, subject: Subject, moment: Moment) -> Finding:
    """Draws what was measured, as NumPy arrays.

    Raises:
      ValueError: for an unknown kind.
    """
    mean_steps = subject.mean_steps
    match kind:
        case "gradient_norms":
            return _present_norms(measured)
        case "activations":
            return _present_activations(measured, mean_steps)
        case "token_correlation":
            return _present_correlation(measured, mean_steps)
        case "attention_maps":
            return Finding(figures.draw_maps(in_model_order(measured)))
        case "recurrence":
            return _present_curves(measured, mean_steps)
        case "spectral_radius":
            figure = figures.draw_curves({"spectral radius of the core": measured}, mean_steps)
            figures.mark_one(figure)
            return Finding(figure, {"spectral_radius": _at(measured, mean_steps)})
        case "depth_draws":
            return _present_draws(measured, moment)
    raise ValueError(f"no kind of diagnostics {kind!r}")


def _present_norms(norms: LayerNorms) -> Finding:
    gradient = {name: float(value) for name, value in in_model_order(norms.gradient).items()}
    weight = {name: float(norms.weight[name]) for name in gradient}
    scalars = {f"gradient_norm/{name}": value for name, value in gradient.items()}
    scalars |= {f"weight_norm/{name}": value for name, value in weight.items()}
    return Finding(figures.draw_norms(gradient, weight), scalars)


def _present_activations(states: LayerStates, mean_steps: int) -> Finding:
    samples, scalars = {}, {}
    for name, summary in states.outer.items():
        samples[name] = summary.sample[summary.is_token]
        scalars[f"activation_rms/{name}"] = float(summary.rms)
    for number in _shown_iterations(states, mean_steps):
        for name, summary in states.core.items():
            values = summary.sample[number - 1]
            samples[f"{name}/iteration_{number}"] = values[summary.is_token[number - 1]]
    for name, summary in states.core.items():
        scalars[f"activation_rms/{name}"] = _at(summary.rms, mean_steps)
    samples = in_model_order(samples)
    histograms = {f"activations/{name}": values for name, values in samples.items()}
    return Finding(figures.draw_histograms(samples), scalars, histograms)


def _shown_iterations(states: LayerStates, mean_steps: int) -> list[int]:
    """The first iteration, the one at the trained mean, and the last one."""
    if not states.core:
        return []
    count = len(next(iter(states.core.values())).rms)
    return sorted({1, min(mean_steps, count), count})


def _present_correlation(states: LayerStates, mean_steps: int) -> Finding:
    summaries = in_model_order(states.outer | states.core)
    outer = {name: float(summaries[name].correlation) for name in summaries if name in states.outer}
    core = {name: summaries[name].correlation for name in summaries if name in states.core}
    figure = figures.draw_by_layer(outer, core, "mean cosine between tokens", mean_steps)
    at_mean = {name: _at(values, mean_steps) for name, values in core.items()}
    return Finding(
        figure, {f"token_correlation/{name}": value for name, value in (outer | at_mean).items()}
    )


def _present_curves(curves: Mapping[str, np.ndarray], mean_steps: int) -> Finding:
    figure = figures.draw_curves(
        {
            "residual |h' - h| / |h'|": curves["residual"],
            "contraction of the change": curves["contraction"],
            "size of the state per token": curves["state_norm"],
        },
        mean_steps,
    )
    return Finding(figure, {name: _at(values, mean_steps) for name, values in curves.items()})


def _present_draws(counts: np.ndarray, moment: Moment) -> Finding:
    depths = np.arange(1, len(counts) + 1)
    mean = float(depths @ counts) / max(int(counts.sum()), 1)
    title = f"steps {moment.previous + 1} to {moment.step}, mean {mean:.2f}"
    return Finding(figures.draw_counts(counts, title), {"mean_drawn_steps": mean})


def _at(values: np.ndarray, mean_steps: int) -> float:
    """The value at the trained mean, or at the last iteration that was looked at."""
    return float(values[min(mean_steps, len(values)) - 1])


# ------------------------------------------------------------------------------
# Several kinds at once, each measurement made one time.


class Diagnoser:
    """Compiles each measurement on its first use.

    Args:
      subject: what is looked at.
      kinds: which, see `kinds_of`.
    """

    def __init__(self, subject: Subject, kinds: Sequence[str]):
        self._subject = subject
        self._kinds = tuple(kinds)
        names = dict.fromkeys(map(measurement_of, self._kinds))
        self._measures = {name: build_measure(name, subject) for name in names}

    def measure(self, moment: Moment) -> Mapping[str, object]:
        """NumPy arrays by measurement. All processes call this together."""
        return jax.device_get({name: measure(moment) for name, measure in self._measures.items()})

    def present(self, measured: Mapping[str, object], moment: Moment) -> dict[str, Finding]:
        """What to show of them, by kind."""
        return {
            kind: present(kind, measured[measurement_of(kind)], self._subject, moment)
            for kind in self._kinds
        }


def write_images(findings: Mapping[str, Finding], folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Writes `<kind>.png` into the folder, which is made, and returns the pixels by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {kind: to_image(finding.figure) for kind, finding in findings.items()}
    for kind, image in images.items():
        imsave(folder / f"{kind}.png", image)
    return images


def finite_scalars(findings: Mapping[str, Finding]) -> dict[str, float]:
    """The scalars of all findings without those that are not finite."""
    return {
        name: float(value)
        for finding in findings.values()
        for name, value in finding.scalars.items()
        if np.isfinite(value)
    }


def write_scalars(findings: Mapping[str, Finding], path: pathlib.Path) -> None:
    """Writes them to a JSON file."""
    write_json(path, finite_scalars(findings))


# ------------------------------------------------------------------------------
# The hook of the training loop.

PREFIX = "diagnostics"


class DiagnosticsHook:
    """Measures on all processes; the primary one draws and writes (a `Hook`).

    A figure of kind K after step n goes to `<folder>/step_<n>/K.png` and to the writer's images,
    histograms to the writer, scalars back to the loop. All are named `diagnostics/...`.

    Args:
      subject: what is looked at.
      params_of: from the train state to the model's parameters.
      writer: takes images and histograms.
      folder: where PNGs go. None: this process writes nothing.
    """

    at_stop = False
    skips_bad_steps = True

    def __init__(
        self,
        subject: Subject,
        params_of: Callable[[Any], Any],
        writer: MetricWriter,
        folder: pathlib.Path | None,
    ):
        self.every_steps = subject.config.diagnostics.every_steps
        self.at_end = self.every_steps > 0
        self._diagnoser = Diagnoser(subject, kinds_of(subject))
        self._params_of = params_of
        self._writer = writer
        self._folder = folder

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns the scalars that are finite."""
        previous = (step - 1) // self.every_steps * self.every_steps
        moment = Moment(self._params_of(state), state.key_data, step, previous)
        measured = self._diagnoser.measure(moment)
        if self._folder is None:
            return {}
        findings = self._diagnoser.present(measured, moment)
        folder = self._folder / f"step_{step:06d}"
        self._write(step, findings, folder)
        logging.info("diagnostics after step %d: %s", step, folder)
        return {f"{PREFIX}/{name}": value for name, value in finite_scalars(findings).items()}

    def _write(self, step: int, findings: Mapping[str, Finding], folder: pathlib.Path) -> None:
        images = write_images(findings, folder)
        self._writer.write_images(step, {f"{PREFIX}/{k}": image for k, image in images.items()})
        finite = {
            f"{PREFIX}/{name}": values[np.isfinite(values)]
            for finding in findings.values()
            for name, values in finding.histograms.items()
        }
        self._writer.write_histograms(step, {k: v for k, v in finite.items() if v.size})
