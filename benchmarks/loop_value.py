"""What a loop is worth: the loop exponent phi of a way to loop, by a grid of small runs.

    python -m benchmarks.loop_value --adapter=linear --json=linear.json
    python -m benchmarks.loop_value --adapter=none --hyper-connections=2 --json=hyper.json
    python -m benchmarks.loop_value --compare linear.json hyper.json --figure=loop_value.png

After arXiv 2604.21106. All models of the grid execute the same number of layers; with r loops the
core has 1/r of them and is iterated r times. The law of the loss is

    L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta

N_once are the parameters that run once (prelude, coda), N_rec those of an iteration, D the tokens
of training; embedding and head do not count. phi = 0: further loops are worthless. phi = 1: a loop
is as good as layers with their own parameters.

`benchmarks/scaling_law.py` has the fit, and how the 95% interval is made.

Every finished run is a line of the file --runs, and a run that has a line is not trained again. The
runs without a loop (r = 1) have no adapter, so different recipes in one file share them.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

import megatransformer_jax as mt
from benchmarks.scaling_law import Fit, Outcome, fit_law
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError, options_of, parse_text
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import AllOptions
from megatransformer_jax.data.pipeline import build_pipeline, first_batches
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.validation import ValidationSet, make_eval_step
from megatransformer_jax.models.cost.parameter_counts import (
    ITERATED_PARTS,
    count_parameters,
    total_parameters,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy

HEAD_WIDTH = 32
# Of --learning-rate; the rate of other widths is in inverse proportion to them.
REFERENCE_WIDTH = 64
# Byte values and special tokens.
VOCAB_SIZE = 260
VALIDATION_BATCHES = 16
# What runs once, besides embedding and head.
ONCE_PARTS = ("prelude", "injection_norm", "loop_parameters", "c_matrix", "coda", "final_norm")


# ------------------------------------------------------------------------------
# The grid.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the models of a grid loop, and how they are trained."""

    adapter: str
    norm: str
    backprop_depth: int | None
    hyper_connections: int
    layers: tuple[int, int, int]
    learning_rate: float
    batch: int
    length: int
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """For tables."""
        words = [f"adapter {self.adapter}"]
        if self.hyper_connections:
            words.append(f"{self.hyper_connections} streams")
        if self.backprop_depth is not None:
            words.append(f"gradient through {self.backprop_depth}")
        return ", ".join([*words, *self.changes])

    def without_loop(self) -> "Recipe":
        """The same where the core runs once."""
        changes = tuple(text for text in self.changes if not _is_of_loop(text))
        return dataclasses.replace(
            self, adapter="none", backprop_depth=None, hyper_connections=0, changes=changes
        )


def _is_of_loop(change: str) -> bool:
    return change.startswith("model.recurrence.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    loops: int
    width: int
    tokens: int
    seed: int


def configuration(recipe: Recipe, cell: Cell) -> RunConfig:
    """The run's configuration.

    Raises:
      UserError: if a value cannot be used.
    """
    prelude, core, coda = recipe.layers
    if core % cell.loops:
        raise UserError(
            f"--layers: {core} layers of the core cannot be cut for {cell.loops} loops; use a "
            "multiple of all --loops."
        )
    steps = max(2, round(cell.tokens / (recipe.batch * recipe.length)))
    recurrence = {
        "adapter": recipe.adapter,
        "hyper_connections": recipe.hyper_connections,
        "state_init": "none",
        "sampling": "fixed",
        "mean_steps": cell.loops,
        "max_steps": cell.loops,
        "backprop_depth": min(recipe.backprop_depth or cell.loops, cell.loops),
    }
    options: dict[str, Any] = {
        "model.vocab_size": VOCAB_SIZE,
        "model.width": cell.width,
        "model.max_length": recipe.length,
        "model.prelude_layers": prelude,
        "model.core_layers": core // cell.loops,
        "model.coda_layers": coda,
        "model.attention.num_heads": max(1, cell.width // HEAD_WIDTH),
        "model.mlp.hidden_width": 8 * round(cell.width / 3),
        "model.norm.placement": recipe.norm,
        "model.scan_layers": max(prelude, core // cell.loops, coda) > 1,
        "data.tokenizer.kind": "bytes",
        "data.batch_size": recipe.batch,
        "data.sequence_length": recipe.length,
        "optimizer.learning_rate": recipe.learning_rate * REFERENCE_WIDTH / cell.width,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "train.steps": steps,
    }
    options |= {f"model.recurrence.{name}": value for name, value in recurrence.items()}
    options |= dict(map(_read_change, recipe.changes))
    return cast(RunConfig, mt.configure("recurrent_mini", **options))


def _read_change(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    declared = {option.path: option.declared for option in options_of(AllOptions)}
    if not equals or path not in declared:
        raise UserError(
            f"--set {text}: write OPTION=VALUE with an option of docs/options.md, such as "
            "model.norm.kind=layernorm."
        )
    return path, parse_text(value, declared[path])


# ------------------------------------------------------------------------------
# Runs, and the file that remembers them.


class Course(NamedTuple):
    """State of an optimiser whose rate follows the course of the run: the number of steps is data,
    so that runs of any length share a compiled step."""

    inner: Any
    done: Any
    total: Any


def follow_course(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser with its updates scaled: up to 1 in a tenth of the run, then down to 0."""

    def init(params: Any) -> Course:
        return Course(optimizer.init(params), jnp.float32(0), jnp.float32(1))

    def update(gradients: Any, course: Course, params: Any = None) -> tuple[Any, Course]:
        updates, inner = optimizer.update(gradients, course.inner, params)
        done = course.done + 1
        rising = 10 * done / course.total
        falling = (course.total - course.done) / (0.9 * course.total)
        factor = jnp.minimum(jnp.minimum(rising, falling), 1.0)
        updates = jax.tree.map(lambda leaf: factor * leaf, updates)
        return updates, Course(inner, done, course.total)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Program:
    """What all runs of one model share: compiled once."""

    model: MegaTransformer
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]]
    score: Any


@functools.lru_cache(maxsize=2)
def make_program(recipe: Recipe, loops: int, width: int) -> Program:
    """The program of a model."""
    config = configuration(recipe, Cell(loops, width, 1, 0))
    policy = DTypePolicy.from_precision("auto", jax.default_backend())
    model = build_model(config.model, policy, Sharder(), jax.default_backend())
    optimizer = follow_course(build_optimizer(config.optimizer, config.train.steps))
    # Compiling random numbers for every matrix takes longer than drawing them.
    cheap = {"xla_backend_optimization_level": 0}
    init = jax.jit(functools.partial(init_state, model, optimizer), compiler_options=cheap)
    step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    return Program(model, init, step, jax.jit(make_eval_step(model, jax.random.key(0))))


@functools.lru_cache(maxsize=2)
def text_batches(data: DataConfig, split: str, count: int) -> list[Batch]:
    """The first batches of a split, the same for all runs."""
    with build_pipeline(data, BytesTokenizer(), split=split) as batches:
        return first_batches(batches, count)


def train(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """Trains one model and scores it: numbers of its line in the file."""
    config, start = configuration(recipe, cell), time.perf_counter()
    program = make_program(recipe, cell.loops, cell.width)
    state = program.init(jax.random.key(cell.seed))
    course = state.opt_state._replace(total=jnp.float32(config.train.steps))
    state = dataclasses.replace(state, opt_state=course)
    for batch in text_batches(config.data, "train", config.train.steps):
        state, _ = program.step(state, batch)
    if int(state.skipped_steps):
        raise UserError(
            f"{int(state.skipped_steps)} of {config.train.steps} steps of {cell} were not finite; "
            "lower --learning-rate."
        )
    held_out = text_batches(config.data, "validation", VALIDATION_BATCHES)
    loss = ValidationSet(held_out, program.score).score(state.params, cell.loops).loss
    counts = count_parameters(state.params)
    once, iterated = (
        total_parameters({part: counts.get(part, {}) for part in parts})
        for parts in (ONCE_PARTS, ITERATED_PARTS)
    )
    duration_s = time.perf_counter() - start
    return {"once": once, "iterated": iterated, "loss": loss, "seconds": round(duration_s, 1)}


class Runs:
    """The finished runs of a file of JSON lines, which several processes may add to."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._read()

    def result(self, recipe: Recipe, cell: Cell) -> dict[str, Any]:
        """The line of a run, which is trained if there is none yet."""
        own = recipe.without_loop() if cell.loops == 1 else recipe
        setting = dataclasses.asdict(cell) | dataclasses.asdict(own)
        key = _key(setting)
        finished = self._read()
        if key not in finished:
            line = {"setting": setting} | train(own, cell)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            return line
        return finished[key]

    def _read(self) -> dict[str, dict[str, Any]]:
        finished: dict[str, dict[str, Any]] = {}
        texts = self._path.read_text("utf-8").splitlines() if self._path.is_file() else []
        for number, text in enumerate(texts, start=1):
            try:
                line = json.loads(text)
                finished[_key(line["setting"])] = line
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"--runs: line {number} of {self._path} is not a run of this benchmark; delete "
                    "the line, or name another file."
                ) from error
        return finished


def _key(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


# ------------------------------------------------------------------------------
# The command.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", default="linear", help="model.recurrence.adapter")
    parser.add_argument("--norm", default="pre", help="model.norm.placement")
    parser.add_argument("--backprop-depth", type=int, help="gradient's loops; default: all")
    parser.add_argument("--hyper-connections", type=int, default=0, help="streams; 0: off")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="any option")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4], metavar="R")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 96], metavar="D")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[150_000, 450_000], metavar="N", help="budgets"
    )
    parser.add_argument(
        "--layers", type=int, nargs=3, default=[1, 4, 1], help="executed: prelude, core, coda"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument(
        "--learning-rate", type=float, default=4e-3, help=f"of AdamW at width {REFERENCE_WIDTH}"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=64, help="bytes per row")
    parser.add_argument("--runs", default="runs/loop_value.jsonl", help="file of finished runs")
    parser.add_argument("--resamples", type=int, default=1000, help="for the interval")
    parser.add_argument("--json", help="also write all numbers to this file")
    parser.add_argument("--compare", nargs="+", metavar="JSON", help="results to show; no training")
    parser.add_argument("--figure", help="PNG file of what is compared")
    return parser.parse_args()


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """What the command line describes.

    Raises:
      UserError: if there are not enough sizes or loops to fit the law.
    """
    for name, least in (("loops", 1), ("widths", HEAD_WIDTH), ("tokens", 1), ("seeds", 0)):
        for value in getattr(arguments, name):
            if value < least:
                raise UserError(f"--{name}: {value} is not allowed; at least {least}.")
    for name in ("loops", "widths"):
        if len(set(getattr(arguments, name))) < 2:
            raise UserError(f"--{name}: the law needs two different ones or more.")
    return Recipe(
        adapter=arguments.adapter,
        norm=arguments.norm,
        backprop_depth=arguments.backprop_depth,
        hyper_connections=arguments.hyper_connections,
        layers=tuple(arguments.layers),
        learning_rate=arguments.learning_rate,
        batch=arguments.batch,
        length=arguments.length,
        changes=tuple(sorted(arguments.set)),
    )


def run_grid(arguments: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """The lines of all runs; those of one model follow each other, as they share a program."""
    cells = [
        Cell(loops, width, tokens, seed)
        for width in sorted(set(arguments.widths))
        for loops in sorted(set(arguments.loops))
        for tokens in sorted(set(arguments.tokens))
        for seed in arguments.seeds
    ]
    for cell in cells:
        configuration(recipe.without_loop() if cell.loops == 1 else recipe, cell)
    runs, lines = Runs(pathlib.Path(arguments.runs)), []
    print("| loops | width | tokens | seed | once | iterated | loss | seconds |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for cell in cells:
        line = runs.result(recipe, cell)
        numbers = f"{line['once']} | {line['iterated']} | {line['loss']:.4f} | {line['seconds']}"
        print(
            f"| {cell.loops} | {cell.width} | {cell.tokens} | {cell.seed} | {numbers} |", flush=True
        )
        lines.append(line)
    return lines


def fit_lines(lines: list[dict[str, Any]], resamples: int) -> Fit:
    """The law of some runs."""
    names = [field.name for field in dataclasses.fields(Outcome)]
    outcomes = [
        Outcome(**{name: (line["setting"] | line)[name] for name in names}) for line in lines
    ]
    return fit_law(outcomes, resamples)


def print_fit(name: str, fit: Fit) -> None:
    low, high = fit.interval
    print(f"\n{name}: phi = {fit.phi:.2f}, 95% interval {low:.2f} to {high:.2f}")
    floors = ", ".join(f"{floor:.3f} at {tokens}" for tokens, floor in fit.floors.items())
    print(f"alpha {fit.alpha:.3f}, A {fit.scale:.3g}, E + B D^-beta: {floors}")
    if fit.data is None:
        print("E, B and beta are not determined by fewer than three budgets of tokens")
    else:
        print("E {:.3f}, B {:.3g}, beta {:.3f}".format(*fit.data))
    print(f"root of the mean squared residual {fit.residual:.4f}")


def compare(paths: list[str], figure: str | None) -> None:
    """Shows results of several recipes side by side."""
    found = []
    for path in map(pathlib.Path, paths):
        try:
            result = json.loads(path.read_text("utf-8"))
            found.append((result["recipe"], result["fit"], result["runs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--compare: {path} is not a result of this benchmark; write one by --json."
            ) from error
    print("| recipe | phi | 95% interval | residual |\n|---|---:|---:|---:|")
    for name, fit, _ in found:
        low, high = fit["interval"]
        print(f"| {name} | {fit['phi']:.2f} | {low:.2f} to {high:.2f} | {fit['residual']:.4f} |")
    if figure is not None:
        draw(found, pathlib.Path(figure))


def draw(found: list[tuple[str, dict[str, Any], list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """Left: loss against parameters of the runs with most tokens. Right: phi and its interval."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(line["setting"]["tokens"] for _, _, lines in found for line in lines)
    for place, (name, fit, lines) in enumerate(found):
        color = f"C{place}"
        for loops in sorted({line["setting"]["loops"] for line in lines}):
            of_loops: dict[int, list[float]] = {}
            for line in lines:
                if (line["setting"]["loops"], line["setting"]["tokens"]) == (loops, most):
                    of_loops.setdefault(line["once"] + line["iterated"], []).append(line["loss"])
            sizes = sorted(of_loops)
            style = {1: "ko-", 2: "s--"}.get(loops, "^:")
            label = "no loop" if loops == 1 else f"{name}, {loops} loops"
            shown = {} if loops == 1 else {"color": color}
            if loops > 1 or place == 0:
                means = [np.mean(of_loops[size]) for size in sizes]
                left.plot(sizes, means, style, label=label, markersize=4, **shown)
        low, high = fit["interval"]
        right.plot([low, high], [place, place], color=color)
        right.plot([fit["phi"]], [place], "o", color=color)
    left.set(xscale="log", xlabel="parameters without embedding", ylabel="validation loss")
    left.legend(fontsize=6)
    right.axvline(0, color="gray", linewidth=0.5)
    right.axvline(1, color="gray", linewidth=0.5)
    right.set(xlabel="phi (0: worthless, 1: as own layers)")
    right.set_yticks(range(len(found)), [name for name, _, _ in found], fontsize=7)
    right.set_ylim(len(found) - 0.5, -0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.compare:
            compare(arguments.compare, arguments.figure)
            return
        if arguments.figure:
            raise UserError("--figure: draws what is compared; give --compare too.")
        recipe = make_recipe(arguments)
        lines = run_grid(arguments, recipe)
    except UserError as error:
        sys.exit(f"error: {error}")
    fit = fit_lines(lines, arguments.resamples)
    print_fit(recipe.name, fit)
    if arguments.json:
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        summary = {
            "recipe": recipe.name,
            "device": jax.devices()[0].device_kind,
            "versions": {"python": platform.python_version(), **versions},
            "arguments": vars(arguments),
            "fit": dataclasses.asdict(fit),
            "runs": lines,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(summary, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
