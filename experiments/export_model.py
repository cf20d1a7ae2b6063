"""Writes a checkpoint of a run as a Huginn folder."""

import argparse
import re
from typing import Any

from absl import logging

from experiments.load_model import is_huginn_folder, load_model, parse_step
from megatransformer_jax.checkpoints.huginn import check_output_folder, save_huginn
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


def export_model(options: argparse.Namespace) -> str:
    """Does what the options of `experiments.export` say and tells what was exported.

    Raises:
      UserError: if the model or the folder does not allow it.
    """
    step, max_shard_bytes = parse_step(options.step), parse_size(options.max_shard)
    check_output_folder(options.output.absolute(), overwrite=options.overwrite)
    if is_huginn_folder(options.workdir):
        raise UserError(f"--workdir={options.workdir} is a Huginn folder already; name a run.")
    loaded = load_model(options.workdir, step=step)
    try:
        save_huginn(
            options.output,
            loaded.config,
            loaded.params,
            max_shard_bytes=max_shard_bytes,
            dtype=options.dtype,
            with_rotary_table=options.rotary_table,
            overwrite=options.overwrite,
            **_tokenizer_arguments(loaded.tokenizer),
        )
    except OSError as error:
        raise UserError(
            f"--output={options.output}: cannot be written ({error.strerror or error}); make "
            "room, or choose another folder."
        ) from error
    return loaded.description


def parse_size(text: str) -> int:
    """Bytes of a size such as '5GiB' or '500MB'.

    Raises:
      UserError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UserError(
            f"--max_shard={text}: give a number above 0 and a unit, such as 5GiB; the units are "
            f"{', '.join(_UNITS)}."
        )
    return size


def _tokenizer_arguments(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The arguments of `save_huginn` that keep the tokenizer, as far as it has a file."""
    arguments: dict[str, Any] = {}
    if tokenizer is not None and not isinstance(tokenizer, SymbolTokenizer):
        arguments["special_ids"] = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    if isinstance(tokenizer, SentencePieceTokenizer):
        arguments["tokenizer_model"] = tokenizer.model
    else:
        logging.warning(
            "the run's %s has no file, so no tokenizer is exported: prompts for the exported "
            "model must be token ids.",
            type(tokenizer).__name__,
        )
    return arguments
