"""Rounds the weights of a finished model: `megatransformer quantize`."""

import dataclasses

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    check_output_is_named,
    model_folder,
    model_option,
    output_option,
    step_option,
)
from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    compilation_cache_option,
    option,
    part_of,
    rule,
)
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.scoring import ScoringConfig
from megatransformer_jax.runs.workdir import check_empty, use_compilation_cache
from megatransformer_jax.storage import local_path

_OF_REPORT = ("depths", "files", "num_batches")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(QuantizationConfig):
    """Which model is quantised how, where it goes, and what the report is made on."""

    model: str | None = model_option()
    step: str = step_option()
    output: str | None = output_option()
    depths: tuple[int, ...] = option(
        (),
        "Depths of the report. Default (empty): evaluation.final_depths of the run; for other "
        "models a quarter, half, all and twice the trained mean.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    files: tuple[str, ...] = option(
        (),
        "Files with text for the report (.txt, .jsonl, .parquet). Default (empty): the validation "
        "split of the run; a model without a run has no report then.",
    )
    num_batches: int | None = option(
        None,
        "Largest number of batches for the report. Default (None): all.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    compilation_cache_dir: str | None = compilation_cache_option()

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        check_output_is_named(self.output)

    @property
    def quantization(self) -> QuantizationConfig:
        """How the model is quantised."""
        return part_of(self, QuantizationConfig)

    @property
    def scoring(self) -> ScoringConfig:
        """What the report is made on."""
        return ScoringConfig(**{name: getattr(self, name) for name in _OF_REPORT})


def quantize(parsed: Parsed) -> None:
    """Quantises, prints the report and writes the folder.

    Raises:
      UserError: if an option does not fit the model, or a folder cannot be used.
    """
    options: QuantizeOptions = parsed.options
    folder = model_folder(options.model)
    assert options.output is not None  # A rule says so.
    # These import JAX, which takes long.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.generation.request import (  # noqa: PLC0415
        out_of_memory_is_bad_input,
    )
    from megatransformer_jax.runs.load import load_model  # noqa: PLC0415
    from megatransformer_jax.runs.quantize import (  # noqa: PLC0415
        compare_models,
        quantize_model,
        save_quantized,
        size_table,
        sizes,
    )

    output, scoring = local_path("output", options.output), options.scoring
    check_empty("output", output)
    use_compilation_cache(options.compilation_cache_dir)
    loaded = load_model(folder, step=options.step)
    has_data = bool(scoring.files) or loaded.run_config is not None
    if not has_data and scoring != ScoringConfig():
        raise ConfigError(
            "files", f"is missing; {loaded.description} has no validation data for a report."
        )
    console, rows = Console(), []
    with out_of_memory_is_bad_input():
        quantized = quantize_model(loaded, options.quantization)
        if has_data:
            report = compare_models(loaded, quantized, scoring)
            console.print(report.tables[0])
            rows = list(report.rows)
    console.print(size_table(sizes(quantized.params)))
    if not has_data:
        console.print("No report by depth: the model has no validation data. Name some in --files.")
    save_quantized(quantized, output, rows)
    print(f"{quantized.description} -> {options.output}")


COMMAND = Command(
    name="quantize",
    doc="""Rounds the weights of a finished model to 8 or 4 bits, for inference.

Prints by depth what that changes: loss, KL divergence, error of the latents, iterations until a
token would leave, and bytes. The new folder serves as --model of generate, evaluate and lm-eval. It
holds the report too, in quantization.json. Needs the extra 'quantization'; reading the folder does
not.""",
    options=QuantizeOptions,
    run=quantize,
    examples=(
        "--model=runs/recurrent --weights=int8 --output=runs/int8",
        "--model=runs/recurrent --weights=int4 --method=gptq --output=runs/int4",
        "--model=runs/recurrent --activations=int8 --include='^core/layers' --output=runs/core8",
        "--model=my/huginn --method=awq --weights=int4 --calibration_files=my/a.txt \\\n"
        "      --files=my/b.txt --output=my/int4",
    ),
)
