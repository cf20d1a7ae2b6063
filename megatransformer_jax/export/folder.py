"""A folder with a model's programs and all that runs them without this package.

| file                              | holds                                                       |
|-----------------------------------|-------------------------------------------------------------|
| program.json                      | shapes, names, versions, criteria, keys, tokenizer          |
| prefill.stablehlo, step.stablehlo | the programs; parameters.safetensors has their parameters   |
| prefill.onnx, step.onnx           | the same for onnxruntime; weights.bin has their parameters  |
| tokenizer.model, tokenizer.json   | the tokenizer, if it is SentencePiece's or Hugging Face's   |
| generate.py                       | a loop in NumPy around them                                 |
"""

import importlib.metadata
import pathlib
from typing import Any

import jax
import numpy as np
from jax import export
from jaxlib.mlir.dialects import stablehlo
from rich.table import Table
from safetensors.numpy import save_file

from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.sampling import GATE_THRESHOLD
from megatransformer_jax.data.hf_tokenizer import TOKENIZER_FILE, HuggingFaceTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.export import loop
from megatransformer_jax.export.check import check_program
from megatransformer_jax.export.onnx_file import write_onnx
from megatransformer_jax.export.program import Programs, Shapes, build_programs, named
from megatransformer_jax.generation.endings import end_ids_of
from megatransformer_jax.generation.request import prompt_keys, sample_keys
from megatransformer_jax.models.exit_criteria import EXIT_CRITERIA
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.workdir import check_empty, make_folder
from megatransformer_jax.storage import make_readable, write_atomically, write_json

ABOUT_FILE = "program.json"
LOOP_FILE = "generate.py"
SENTENCEPIECE_FILE = "tokenizer.model"
PARAMETERS_FILE = "parameters.safetensors"
PLATFORMS = ("cpu", "tpu", "cuda")
# Of program.json.
_LAYOUT = 1


def export_program(loaded: LoadedModel, output: pathlib.Path, config: ProgramConfig) -> Report:
    """Writes the folder, and checks it if `config.check` asks for that.

    Args:
      loaded: a model of text.
      output: the folder; absent or empty.
      config: what the programs can do.

    Returns:
      The files with their sizes, or what the check found.

    Raises:
      UserError: if the model cannot be exported, an option does not fit it, or the folder cannot
        be used.
    """
    check_empty("output", output)
    programs = build_programs(loaded.model, loaded.params, loaded.trained_depth, config)
    params = {name: np.asarray(leaf) for name, leaf in named(loaded.params).items()}
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    folder = make_folder("output", str(output))
    if config.format == "onnx":
        of_format = write_onnx(programs, params, folder)
    else:
        of_format = _write_stablehlo(programs, shapes, folder)
        save_file(params, folder / of_format["parameters"])
        make_readable(folder / of_format["parameters"])
    tokenizer = _write_tokenizer(loaded.tokenizer, folder)
    source = pathlib.Path(loop.__file__).read_text(encoding="utf-8")
    write_atomically(folder / LOOP_FILE, source)
    about = _about(programs, shapes, loaded) | of_format | {"tokenizer": tokenizer}
    # Last, so that a folder with it is whole.
    write_json(folder / ABOUT_FILE, about)
    return check_program(folder, loaded, programs) if config.check else _files(folder)


def _write_stablehlo(programs: Programs, params: Shapes, folder: pathlib.Path) -> dict[str, Any]:
    """Writes an artifact per pass; parameters are arguments, so that both share one file of them.

    JAX reads its artifacts for at least six months, and StableHLO promises five years.
    """
    version = 0
    for name in programs.columns:
        traced = jax.jit(programs.call, donate_argnames=("cache",))
        exported = export.export(traced, platforms=PLATFORMS)(
            params, programs.inputs(name), programs.cache
        )
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        version = exported.calling_convention_version
    return {
        "parameters": PARAMETERS_FILE,
        "platforms": list(PLATFORMS),
        "versions": {
            "jax": jax.__version__,
            "calling_convention": version,
            "stablehlo": stablehlo.get_current_version(),
        },
    }


def _about(programs: Programs, params: Shapes, loaded: LoadedModel) -> dict[str, Any]:
    config, cache = programs.config, programs.empty_cache()
    keys = prompt_keys(config.seed, range(config.batch))
    suffix = "onnx" if config.format == "onnx" else "stablehlo"
    is_recurrent = programs.model.config.is_recurrent
    return {
        "layout": _LAYOUT,
        "format": config.format,
        "model": loaded.description,
        "package": f"megatransformer_jax {importlib.metadata.version('megatransformer_jax')}",
        "batch": config.batch,
        "capacity": config.capacity,
        "chunk": config.chunk,
        "max_length": programs.model.config.max_length,
        "depth": loaded.trained_depth,
        "gate_readout": config.gate_readout,
        "gate_threshold": GATE_THRESHOLD,
        "criteria": {name: EXIT_CRITERIA[name].default_threshold for name in config.criterion}
        if is_recurrent
        else {},
        "criteria_that_read_logits": [
            name for name in config.criterion if is_recurrent and EXIT_CRITERIA[name].needs_logits
        ],
        "cache_slots": config.cache_slots if is_recurrent else None,
        "cache_sharing": config.cache_sharing,
        "cache_exited_reads": config.cache_exited_reads,
        # As generation has them: prompts may be continued several times, each draw differently.
        "keys": {
            "prefill": jax.random.key_data(keys).tolist(),
            "step": jax.random.key_data(sample_keys(keys, 1)).tolist(),
        },
        "programs": {
            name: {
                "file": f"{name}.{suffix}",
                "inputs": _listed(programs.inputs(name)),
                "outputs": _listed(programs.outputs(params, name)),
            }
            for name in programs.columns
        },
        "cache": [
            {**entry, "fill": np.asarray(cache[entry["name"]]).ravel()[0].item()}
            for entry in _listed(programs.cache)
        ],
    }


def _listed(shapes: Shapes) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(entry.shape), "dtype": str(entry.dtype)}
        for name, entry in shapes.items()
    ]


def _write_tokenizer(tokenizer: Tokenizer | None, folder: pathlib.Path) -> dict[str, Any]:
    """What program.json says of the tokenizer; its file is written, if it has one."""
    ends = [int(token) for token in end_ids_of(tokenizer)]
    about: dict[str, Any] = {"kind": "none", "end_ids": ends}
    if tokenizer is None:
        return about
    about["start_id"] = tokenizer.bos_id
    if isinstance(tokenizer, BytesTokenizer):
        return about | {"kind": "bytes"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_atomically(folder / SENTENCEPIECE_FILE, tokenizer.model)
        return about | {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_atomically(folder / TOKENIZER_FILE, tokenizer.definition)
        return about | {"kind": "tokenizers", "file": TOKENIZER_FILE}
    return about


def _files(folder: pathlib.Path) -> Report:
    rows = [{"file": path.name, "bytes": path.stat().st_size} for path in sorted(folder.iterdir())]
    table = Table("file", "bytes", title=str(folder))
    for row in rows:
        table.add_row(str(row["file"]), f"{row['bytes']:,}")
    return Report(rows, [table], lambda folder: [])
