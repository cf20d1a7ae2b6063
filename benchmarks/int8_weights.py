"""Perplexity and size of a trained model with its matrices in int8, as under LoRA.

    python -m benchmarks.int8_weights --workdir=runs/recurrent --depths 1 8 32

The run's own validation set. Needs the extra 'qlora'.
"""

import argparse
import pathlib
import platform

import jax
import jax.numpy as jnp
import jaxlib

from megatransformer_jax.config.build import load_config
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.evaluation.depth_table import score_depths
from megatransformer_jax.evaluation.validation import ValidationSet, make_eval_step
from megatransformer_jax.models.adaptation import dequantize_params, quantize_params
from megatransformer_jax.models.cost.memory import tree_bytes
from megatransformer_jax.models.megatransformer import param_axes
from megatransformer_jax.runs.load import load_model


def main() -> None:
    """Measures the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of a run on text")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batches", type=int, default=8, help="of the run's validation set")
    options = parser.parse_args()
    loaded = load_model(options.workdir)
    data = load_config(options.workdir / "config.json").data
    axes = param_axes(loaded.model)
    stored = jax.jit(lambda params: quantize_params(params, axes))(loaded.params)
    step = jax.jit(make_eval_step(loaded.model, jax.random.key(0)))
    batches = validation_batches(
        data, loaded.tokenizer, num_batches=options.batches, process_index=0, process_count=1
    )
    validation = ValidationSet([jax.tree.map(jnp.asarray, batch) for batch in batches], step)
    print(f"{loaded.description}; jax {jax.__version__}, jaxlib {jaxlib.__version__}, ", end="")
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}")
    print(f"parameters: float32 {tree_bytes(loaded.params):,} B, int8 {tree_bytes(stored):,} B")
    print("| depth | tokens | float32 | int8 | change |\n|---|---|---|---|---|")
    exact = score_depths(loaded.params, validation, options.depths)
    rounded = score_depths(dequantize_params(stored), validation, options.depths)
    for ours, theirs in zip(rounded, exact, strict=True):
        change = ours.perplexity / theirs.perplexity - 1
        print(
            f"| {ours.depth} | {ours.tokens:,.0f} | {theirs.perplexity:.3f} | "
            f"{ours.perplexity:.3f} | {change:+.2%} |"
        )


if __name__ == "__main__":
    main()
