"""What each kind of diagnostic measures, and what it shows."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from megatransformer_jax.config.loop import DIAGNOSTIC_KINDS, RECURRENT_KINDS
from megatransformer_jax.evaluation.diagnostics import figures
from megatransformer_jax.evaluation.diagnostics.attention_maps import attention_maps
from megatransformer_jax.evaluation.diagnostics.depth_draws import count_draws
from megatransformer_jax.evaluation.diagnostics.gradient_norms import LayerNorms, gradient_norms
from megatransformer_jax.evaluation.diagnostics.layer_order import in_model_order
from megatransformer_jax.evaluation.diagnostics.layer_states import LayerStates, layer_states
from megatransformer_jax.evaluation.diagnostics.subject import Subject
from megatransformer_jax.evaluation.iteration_curves import IterationCurves, iteration_curves
from megatransformer_jax.evaluation.spectral_radius import spectral_radius

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

    def count(key_data: Any, first: Any, last: Any) -> jax.Array:
        run_key = jax.random.wrap_key_data(key_data)
        return count_draws(recurrence, run_key, first, last, data.batch_size, data.sequence_length)

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
