"""Continues prompts with the programs of this folder: `python generate.py --prompt="The "`.

Needs NumPy and what program.json names, onnxruntime or JAX; not the package that wrote the folder.
Each row takes its likeliest token until it ends, or --max_new_tokens have been added.
"""
# ruff: noqa: PLC0415 (either of the two runtimes is enough)

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


def open_folder(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    """program.json, and functions by name: (inputs, cache) -> (outputs, cache), named arrays."""
    about = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    opened = _open_onnx if about["format"] == "onnx" else _open_stablehlo
    return about, {name: opened(folder, about, name) for name in about["programs"]}


def _open_onnx(folder: pathlib.Path, about: Mapping[str, Any], name: str) -> Callable[..., Any]:
    import onnxruntime

    entry = about["programs"][name]
    session = onnxruntime.InferenceSession(folder / entry["file"])
    names = [output["name"] for output in entry["outputs"]]
    names += [f"next_{array['name']}" for array in about["cache"]]

    def run(inputs: dict[str, Any], cache: dict[str, Any]) -> Any:
        outputs = dict(zip(names, session.run(names, inputs | cache), strict=True))
        return outputs, {name: outputs.pop(f"next_{name}") for name in cache}

    return run


def _open_stablehlo(
    folder: pathlib.Path, about: Mapping[str, Any], name: str
) -> Callable[..., Any]:
    import jax
    from jax import export
    from safetensors.numpy import load_file

    params = jax.device_put(load_file(folder / about["parameters"]))
    file = folder / about["programs"][name]["file"]
    program = export.deserialize(bytearray(file.read_bytes()))
    call = jax.jit(program.call, donate_argnums=2)
    return lambda inputs, cache: call(params, inputs, cache)


def generate(
    about: Mapping[str, Any],
    programs: Mapping[str, Callable[..., Any]],
    prompts: Sequence[Sequence[int]],
    count: int,
    end_ids: Sequence[int] = (),
    **settings: Any,
) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (tokens, iterations, is_running) of all rows, int and bool [B], `count` times at most.

    `prompts` are ids of at most `batch` rows. `settings` are depth, threshold, min_depth and the
    name of the criterion; what is left out is as program.json says.
    """
    rows, chunk = about["batch"], about["chunk"]
    # A prompt's last token passes alone, as new ones do.
    columns = -(-(max(map(len, prompts)) - 1) // chunk) * chunk
    longest = max(map(len, prompts)) + count - 1
    if longest > about["max_length"]:
        raise SystemExit(f"{longest} tokens; the model reads at most {about['max_length']}")
    if len(prompts) > rows or columns + count > about["capacity"]:
        raise SystemExit(
            f"{len(prompts)} prompts, and {columns} + {count} padded and new tokens; this "
            f"program takes at most {rows} and {about['capacity']}"
        )
    size = about["programs"]["prefill"]["outputs"][0]["shape"][-1]
    if unknown := [token for ids in prompts for token in ids if not 0 <= token < size]:
        raise SystemExit(f"token id {unknown[0]}: this program has 0 to {size - 1}")
    tokens = np.zeros((rows, columns), np.int32)
    is_token = np.zeros((rows, columns), bool)
    chosen, is_running = np.zeros(rows, np.int32), np.arange(rows) < len(prompts)
    for row, (*before, last) in enumerate(prompts):
        tokens[row, : len(before)], is_token[row, : len(before)] = before, True
        chosen[row] = last
    given = {name: _settings(about, settings, name) for name in programs}
    cache = {c["name"]: np.full(c["shape"], c["fill"], c["dtype"]) for c in about["cache"]}
    for first in range(0, columns, chunk):
        part = slice(first, first + chunk)
        now = {"tokens": tokens[:, part], "is_token": is_token[:, part]}
        _, cache = programs["prefill"](now | given["prefill"], cache)
    step = given["step"] | {k: v for k, v in given["prefill"].items() if k == "keys"}
    for _ in range(count):
        now = {"tokens": chosen[:, None], "is_token": is_running[:, None]}
        outputs, cache = programs["step"](now | step, cache)
        step = given["step"]
        chosen = np.asarray(outputs["logits"]).argmax(-1).astype(np.int32)
        yield chosen, np.asarray(outputs.get("num_steps", np.zeros(rows, np.int32))), is_running
        is_running = is_running & ~np.isin(chosen, end_ids)
        if not is_running.any():
            return


def _settings(about: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a program is told besides tokens and cache."""
    criteria = about["criteria"]
    criterion = settings.get("criterion") or next(iter(criteria), None)
    if settings.get("criterion") and criterion not in criteria:
        raise SystemExit(f"criterion {criterion}: this program has {', '.join(criteria) or 'none'}")
    for key in ("depth", "min_depth"):
        if not 1 <= (settings.get(key) or 1) < 2**31 or settings.get(key) == 0:
            raise SystemExit(f"{key} {settings[key]}: give a whole number from 1 to 2^31 - 1")
    default = {name: about[name] for name in ("depth", "gate_threshold")}
    default |= {"min_depth": 1, "threshold": criteria.get(criterion)}
    values = default | {key: value for key, value in settings.items() if value is not None}
    values["criterion"] = [*criteria].index(criterion) if criteria else 0
    if name == "prefill" and criterion in about["criteria_that_read_logits"]:
        # Within a pass they would judge a token by neighbours in the middle of their iterations.
        values["min_depth"] = values["depth"]
    values["keys"] = about["keys"][name]
    entries = about["programs"][name]["inputs"]
    return {e["name"]: np.asarray(values[e["name"]], e["dtype"]) for e in entries[2:]}


def open_tokenizer(
    folder: pathlib.Path, about: Mapping[str, Any]
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Functions from a text to ids and back."""
    tokenizer = about["tokenizer"]
    found: Any
    if tokenizer["kind"] == "sentencepiece":
        import sentencepiece

        found = sentencepiece.SentencePieceProcessor(str(folder / tokenizer["file"]))
        return found.encode, found.decode
    if tokenizer["kind"] == "tokenizers":
        import tokenizers

        found = tokenizers.Tokenizer.from_file(str(folder / tokenizer["file"]))
        return lambda text: found.encode(text, add_special_tokens=False).ids, found.decode
    if tokenizer["kind"] == "bytes":  # Three special ids, then one per byte.
        return (
            lambda text: [3 + byte for byte in text.encode()],
            lambda ids: bytes(token - 3 for token in ids if token >= 3).decode("utf-8", "replace"),
        )
    raise SystemExit("this folder has no tokenizer; give token ids, --ids=1,2,3")


def _parse_ids(row: str) -> list[int]:
    try:
        return [int(token) for token in row.split(",")]
    except ValueError:
        raise SystemExit(f"ids {row!r}: give whole numbers with commas, such as 1,2,3") from None


def main(texts: Sequence[str], rows: Sequence[str], count: int, **settings: Any) -> None:
    """Continues texts, or rows of ids such as '1,2,3', and prints them."""
    prompts = [_parse_ids(row) for row in rows]
    about, programs = open_folder(HERE)
    decode: Callable[[list[int]], str] = str
    if texts:
        encode, decode = open_tokenizer(HERE, about)
        prompts = [[about["tokenizer"]["start_id"], *encode(text)] for text in texts]
    ends = set(about["tokenizer"]["end_ids"])
    new: list[list[int]] = [[] for _ in prompts]
    steps = []
    for tokens, depths, is_new in generate(about, programs, prompts, count, [*ends], **settings):
        for row in np.flatnonzero(is_new):
            new[row].append(int(tokens[row]))
            steps.append(int(depths[row]))
    for prompt, added in zip(prompts, new, strict=True):
        shown = prompt[1:] + added if texts else added
        print(decode([token for token in shown if token not in ends]))
    print(f"[{len(steps)} tokens, mean depth {np.mean(steps):.2f}]")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", action="append", default=[], help="a text, of each row")
    parser.add_argument("--ids", action="append", default=[], help="token ids instead, as 1,2,3")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--depth", type=int, help="most iterations")
    parser.add_argument("--min_depth", type=int)
    parser.add_argument("--criterion", help="one of program.json's")
    parser.add_argument("--threshold", type=float, help="when a token has settled")
    parser.add_argument("--gate_threshold", type=float, help="of gate_readout=threshold")
    given = vars(parser.parse_args())
    if bool(given["prompt"]) == bool(given["ids"]):
        parser.error("give either --prompt or --ids")
    if given["max_new_tokens"] < 1:
        parser.error("--max_new_tokens: give at least 1")
    main(given.pop("prompt"), given.pop("ids"), given.pop("max_new_tokens"), **given)
