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

E + B D^-beta is one number for each budget of tokens, and is fitted as such; E, B and beta follow
with three budgets or more. phi and alpha minimise the squared residual over a grid of values, and
the interval is the central 95% of phi over resampled runs (each r keeps its number of runs).

Every finished run is a line of the file --runs, and a run that has a line is not trained again. The
runs without a loop (r = 1) have no adapter, so different recipes in one file share them.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import jaxlib
import numpy as np

import megatransformer_jax as mt
from megatransformer_jax.config.option import UserError, options_of, parse_text
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import AllOptions
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.validation import ValidationSet, make_eval_step
from megatransformer_jax.models.cost.parameter_counts import (
    ITERATED_PARTS,
    count_parameters,
    total_parameters,
)

HEAD_WIDTH = 16
# Byte values and special tokens.
VOCAB_SIZE = 260
VALIDATION_BATCHES = 16
# Where phi and alpha are looked for.
PHIS = np.round(np.arange(-1.0, 2.0001, 0.02), 2)
ALPHAS = np.geomspace(0.02, 2.0, 81)
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run's model and result."""

    loops: int
    tokens: int
    once: int
    iterated: int
    loss: float


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
        "data.tokenizer.kind": "bytes",
        "data.batch_size": recipe.batch,
        "data.sequence_length": recipe.length,
        "optimizer.name": "muon",
        "optimizer.learning_rate": recipe.learning_rate,
        "optimizer.warmup_steps": max(1, steps // 10),
        "optimizer.final_fraction": 0.0,
        "samples.every_steps": 0,
        "train.steps": steps,
        "train.seed": cell.seed,
    }
    options |= {f"model.recurrence.{name}": value for name, value in recurrence.items()}
    options |= dict(map(_read_change, recipe.changes))
    return mt.configure("recurrent_mini", **options)


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


def train(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """Trains one model and scores it: numbers of its line in the file."""
    config, start = configuration(recipe, cell), time.perf_counter()
    with mt.Trainer(config, workdir=None) as trainer:
        for _ in range(config.train.steps):
            trainer.step()
        lm = trainer.model
    counts = count_parameters(lm.params)
    once, iterated = (
        total_parameters({part: counts.get(part, {}) for part in parts})
        for parts in (ONCE_PARTS, ITERATED_PARTS)
    )
    batches = validation_batches(config.data, BytesTokenizer(), num_batches=VALIDATION_BATCHES)
    step = jax.jit(make_eval_step(lm.module, jax.random.key(0)))
    loss = ValidationSet(batches, step).score(lm.params, cell.loops).loss
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
# The law.


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law's numbers.

    Attributes:
      phi: loop exponent.
      interval: of phi, 95%.
      alpha: exponent of the parameters.
      scale: A.
      floors: E + B D^-beta of each budget of tokens.
      residual: root of the mean squared residual of the loss.
      data: E, B and beta; None with fewer than three budgets.
    """

    phi: float
    interval: tuple[float, float]
    alpha: float
    scale: float
    floors: dict[int, float]
    residual: float
    data: tuple[float, float, float] | None


def fit_law(outcomes: list[Outcome], resamples: int = 1000, seed: int = 0) -> Fit:
    """Fits the law to the runs of a grid.

    Args:
      outcomes: at least two numbers of loops, and two sizes.
      resamples: of the interval.
      seed: of the resampling.
    """
    loops = np.array([one.loops for one in outcomes])
    budgets = np.array([one.tokens for one in outcomes])
    loss = np.array([one.loss for one in outcomes])
    groups = (budgets[:, None] == np.unique(budgets)).astype(float)
    powers = _powers(outcomes)
    weights = np.concatenate([np.ones((1, len(loss))), _resampled(loops, resamples, seed)])
    errors = _squared_errors(powers, loss, groups, weights)
    best = errors.reshape(len(weights), -1).argmin(axis=1)
    found = PHIS[np.unravel_index(best, errors.shape[1:])[0]]
    at_phi, at_alpha = np.unravel_index(best[0], errors.shape[1:])
    design = np.column_stack([powers[at_phi, at_alpha], groups])
    numbers = np.linalg.lstsq(design, loss, rcond=None)[0]
    alpha = float(ALPHAS[at_alpha])
    # The power is of parameters by their geometric mean, see `_powers`.
    scale = float(numbers[0] * _typical(outcomes) ** alpha)
    low, high = np.percentile(found[1:], (2.5, 97.5)) if resamples else (np.nan, np.nan)
    floors = dict(zip(map(int, np.unique(budgets)), map(float, numbers[1:]), strict=True))
    residual = float(np.sqrt(np.mean((design @ numbers - loss) ** 2)))
    interval = (float(low), float(high))
    return Fit(float(found[0]), interval, alpha, scale, floors, residual, _fit_data(floors))


def _typical(outcomes: list[Outcome]) -> float:
    return float(np.exp(np.mean([np.log(one.once + one.iterated) for one in outcomes])))


def _powers(outcomes: list[Outcome]) -> np.ndarray:
    """(N_once + r^phi N_rec)^-alpha, N in units of a typical size: [phis, alphas, runs]."""
    once, iterated, loops = (
        np.array([getattr(one, name) for one in outcomes], float)
        for name in ("once", "iterated", "loops")
    )
    sizes = (once + loops ** PHIS[:, None] * iterated) / _typical(outcomes)
    return np.asarray(sizes[:, None] ** -ALPHAS[:, None])


def _resampled(loops: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each run counts, [resamples, runs]; those of each number of loops among
    themselves."""
    rng, counts = np.random.default_rng(seed), np.zeros((resamples, len(loops)))
    for number in np.unique(loops):
        (members,) = np.nonzero(loops == number)
        drawn = rng.integers(len(members), size=(resamples, len(members)))
        for place, member in enumerate(members):
            counts[:, member] = (drawn == place).sum(axis=1)
    return counts


def _squared_errors(
    powers: np.ndarray, loss: np.ndarray, groups: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The least squared error with A >= 0 and a free floor per budget: [weights, phis, alphas]."""

    def centred(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Weighted sums of products after each budget's means are taken off."""
        total = np.einsum("wn,...n->w...", weights, left * right)
        for group in groups.T:
            own = weights * group
            size = np.maximum(own.sum(axis=1), 1e-9).reshape(-1, *(1,) * (total.ndim - 1))
            sums = (np.einsum("wn,...n->w...", own, side) for side in (left, right))
            total = total - next(sums) * next(sums) / size
        return np.asarray(total)

    of_powers = np.maximum(centred(powers, powers), 1e-12)
    shared = np.maximum(centred(powers, np.broadcast_to(loss, powers.shape)), 0.0)
    own = centred(loss, loss).reshape(-1, 1, 1)
    return np.asarray(own - shared**2 / of_powers)


def _fit_data(floors: dict[int, float]) -> tuple[float, float, float] | None:
    """E, B and beta of E + B D^-beta; None where they are not determined."""
    if len(floors) < 3:
        return None
    tokens, values = np.array(list(floors), float), np.array(list(floors.values()))
    best = None
    for beta in ALPHAS:
        design = np.column_stack([np.ones_like(tokens), (tokens / tokens[0]) ** -beta])
        numbers = np.linalg.lstsq(design, values, rcond=None)[0]
        error = float(np.sum((design @ numbers - values) ** 2))
        if best is None or error < best[0]:
            best = (error, float(numbers[0]), float(numbers[1] * tokens[0] ** beta), float(beta))
    assert best is not None
    return best[1:]


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
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 80], metavar="D")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[400_000, 1_200_000], metavar="N", help="budgets"
    )
    parser.add_argument(
        "--layers", type=int, nargs=3, default=[1, 4, 1], help="executed: prelude, core, coda"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of Muon")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=128, help="bytes per row")
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
    """The lines of all runs; cheap ones first, so that the first results come early."""
    cells = [
        Cell(loops, width, tokens, seed)
        for seed in arguments.seeds
        for tokens in sorted(set(arguments.tokens))
        for width in sorted(set(arguments.widths))
        for loops in sorted(set(arguments.loops))
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
    right.set(xlabel="phi (0: worthless, 1: as good as own layers)")
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
