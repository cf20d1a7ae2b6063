"""Every decoding strategy on a trained text model: speed, depth, and what the texts are worth.

    python -m benchmarks.strategies --workdir=runs/recurrent
    python -m benchmarks.strategies --workdir=runs/recurrent --only=exit,greedy --rounds=2

Prompts are the first tokens of documents that the run held out. Nothing ends a text early, so all
have `--new` tokens. All strategies run in every round. Columns:
  tokens/s       new tokens per second of `Generator.generate`, prompts included; median.
  vs greedy      the same relative to greedy at the same depth, of each round; median and quartiles.
  iterations     per new token, as the completion says.
  nats           negative log-probability per new token under the model at full depth (the depth of
                 the row), of one pass over prompt and text without a cache.
  full's choice  tokens that this pass too finds the likeliest after the same text. It draws first
                 states of its own where the model has random ones, so greedy may fall short of 1.
  as greedy      tokens before the first one that differs from greedy's text at the same depth.
The last two only for strategies that are meant to give greedy's tokens.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.strategy_cases import GREEDY, Case, make_cases
from benchmarks.timing import Phase, alternate, by_round, call_first, environment, quartiles
from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import build_source
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.load import LoadedModel, load_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a run on text")
    parser.add_argument("--step", default="latest", help="latest, best or a number")
    parser.add_argument("--prompts", type=int, default=4, help="documents")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded at once")
    parser.add_argument("--only", default="", help="strategies whose name begins so, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def held_out_prompts(workdir: pathlib.Path, loaded: LoadedModel, count: int, length: int) -> Any:
    """The first tokens of documents that are long enough, start token in front: [count, length].

    Raises:
      UserError: if the run is not of text, or has too few such documents.
    """
    config, tokenizer = load_config(workdir / "config.json").data, loaded.tokenizer
    if config.source == "reasoning" or tokenizer is None:
        raise UserError(f"{workdir} is not a run on text; name one.")
    documents = build_source(config, "validation")
    prompts: list[list[int]] = []
    for index in range(len(documents)):
        text = documents[index]
        ids = tokenizer.encode(text) if isinstance(text, str) else []
        # One more, so that there is something to continue.
        if len(ids) > length and len(prompts) < count:
            prompts.append([tokenizer.bos_id, *ids[: length - 1]])
    if len(prompts) < count:
        raise UserError(
            f"only {len(prompts)} held-out documents have {length} tokens; ask for less."
        )
    return np.asarray(prompts, np.int32)


def try_case(case: Case, loaded: LoadedModel, prompts: np.ndarray, new: int, batch: int) -> None:
    """Compiles a case and keeps its completions, or why there are none."""
    try:
        config = GenerationConfig(max_new_tokens=new, **case.options)
        size = batch * config.texts_per_prompt
        config = dataclasses.replace(config, batch_size=size)
        generator = Generator(
            loaded.model, loaded.params, loaded.tokenizer, config, loaded.trained_depth, end_ids=()
        )
        phase = Phase(case.name, lambda: prompts, generator.generate)
        case.completions = call_first(phase)
    except (UserError, NotImplementedError) as error:
        case.problem = str(error)
        return
    case.phase = phase


@functools.partial(jax.jit, static_argnums=0)
def judge(
    model: MegaTransformer, params: Any, tokens: jax.Array, depth: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of every token but the first, and whether it is the likeliest."""
    output: Any = model.apply({"params": params}, tokens, num_steps=depth, rngs={"state": key})
    log_probs = jax.nn.log_softmax(output.logits[:, :-1])
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -chosen, chosen >= jnp.max(log_probs, axis=-1)


def summarize_case(
    case: Case, greedy: Case, loaded: LoadedModel, prompts: np.ndarray
) -> dict[str, Any]:
    """The row's numbers."""
    assert case.phase is not None and greedy.phase is not None
    texts = [completion.token_ids for completion in case.completions]
    lengths = np.array([len(text) for text in texts])
    first = prompts.shape[1]
    tokens = np.zeros((len(texts), first + max(lengths)), np.int32)
    tokens[:, :first] = prompts
    for index, text in enumerate(texts):
        tokens[index, first : first + len(text)] = text
    key = jax.random.key(1)
    nats, is_likeliest = jax.device_get(
        judge(loaded.model, loaded.params, jnp.asarray(tokens), jnp.int32(case.depth), key)
    )
    columns = np.arange(first, tokens.shape[1])
    is_new = columns < first + lengths[:, None]
    steps = [count for completion in case.completions for count in completion.depths]
    speeds = [lengths.sum() / seconds for seconds in case.phase.seconds]
    greedy_tokens = sum(len(completion.token_ids) for completion in greedy.completions)
    greedy_speeds = [greedy_tokens / seconds for seconds in greedy.phase.seconds]
    row: dict[str, Any] = {
        "tokens_per_s": quartiles(speeds),
        "relative_speed": quartiles(by_round(speeds, greedy_speeds)),
        "iterations": float(np.mean(steps)),
        "nats": float(nats[:, first - 1 :][is_new].mean()),
        "first_call_s": case.phase.first_call_s,
        "seconds": case.phase.seconds,
    }
    if case.is_greedy:
        pairs = zip(texts, (completion.token_ids for completion in greedy.completions), strict=True)
        row["full_choice"] = float(is_likeliest[:, first - 1 :][is_new].mean())
        row["as_greedy"] = sum(itertools.starmap(_common, pairs)) / int(lengths.sum())
    return row


def _common(text: Sequence[int], other: Sequence[int]) -> int:
    same = (ours == theirs for ours, theirs in zip(text, other, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("tokens/s", "vs greedy", "iterations", "nats", "full's choice", "as greedy")
    print(f"| strategy | depth | {' | '.join(columns)} |")
    print("|:--|" + "--:|" * (1 + len(columns)))
    for row in rows:
        start = f"| {row['name']} | {row['depth']} |"
        if "problem" in row:
            print(f"{start} left out: {row['problem']} |" + " |" * 5)
            continue
        low, median, high = row["relative_speed"]
        shares = [
            f"{row[name]:.3f}" if name in row else "-" for name in ("full_choice", "as_greedy")
        ]
        print(
            f"{start} {row['tokens_per_s'][1]:.0f} | {median:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['iterations']:.2f} | {row['nats']:.3f} | {shares[0]} | {shares[1]} |"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all cases; the numbers as they go to the JSON file."""
    workdir = pathlib.Path(arguments.workdir).expanduser()
    loaded = load_model(workdir, step=arguments.step)
    if loaded.trained_depth is None:
        raise UserError(f"{workdir} holds a model without a core, which has no depth to vary.")
    prompts = held_out_prompts(workdir, loaded, arguments.prompts, arguments.prompt_length)
    # Greedy is what the others are compared with.
    wanted = (GREEDY, *arguments.only.split(","))
    has_exit_gate = loaded.model.config.exit_gate.enabled
    cases = make_cases(loaded.trained_depth, has_exit_gate=has_exit_gate)
    cases = [case for case in cases if case.name.startswith(wanted)]
    for case in cases:
        try_case(case, loaded, prompts, arguments.new, arguments.batch)
    alternate([case.phase for case in cases if case.phase is not None], arguments.rounds, 0)
    greedy = {case.depth: case for case in cases if case.name == GREEDY}
    rows: list[dict[str, Any]] = []
    for case in cases:
        row: dict[str, Any] = {"name": case.name, "depth": case.depth}
        if case.problem is not None:
            row["problem"] = case.problem
        else:
            row |= summarize_case(case, greedy[case.depth], loaded, prompts)
        rows.append(row)
    return {
        **environment(),
        "model": loaded.description,
        "compute_type": str(loaded.model.policy.compute),
        "shape": {"prompts": prompts.shape, "new": arguments.new, "batch": arguments.batch},
        "rounds": arguments.rounds,
        "compile_s": sum(case.phase.first_call_s for case in cases if case.phase is not None),
        "rows": rows,
    }


def main() -> None:
    arguments = parse_arguments()
    try:
        summary = run(arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    shape = ", ".join(f"{name} {value}" for name, value in summary["shape"].items())
    print(
        f"{summary['device']}, {summary['compute_type']}; {summary['versions']}; "
        f"{summary['model']}; {shape}; {summary['rounds']} rounds; first calls, which compile, "
        f"{summary['compile_s']:.0f} s.\n"
    )
    print_table(summary["rows"])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)


if __name__ == "__main__":
    main()
