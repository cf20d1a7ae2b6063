"""Programs as ONNX models for onnxruntime, both with their weights in one file.

A pass is traced first, and its jaxpr becomes a graph (`onnx_graph`). Weights are initialisers of
both models; their numbers stand once in `weights.bin`, as ONNX's external data, so that a model may
exceed the two gigabytes of a protobuf.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from megatransformer_jax.export.program import Programs
from megatransformer_jax.extras import import_extra

WEIGHTS_FILE = "weights.bin"
# Weights start at a page, so that a reader can map them.
_ALIGNMENT = 4096
PURPOSE = "format='onnx'"


def write_onnx(
    programs: Programs, params: Mapping[str, np.ndarray], folder: pathlib.Path
) -> dict[str, Any]:
    """Writes `prefill.onnx`, `step.onnx` and `weights.bin`.

    Args:
      programs: of the model.
      params: its parameters by name.
      folder: exists.

    Returns:
      What program.json says of them besides their inputs and outputs.

    Raises:
      UserError: if onnx is not installed, or an operation of the model has no form in ONNX.
    """
    onnx = import_extra("onnx", "export", PURPOSE)
    import_extra("onnxruntime", "export", PURPOSE)
    from megatransformer_jax.export.onnx_graph import OPSET  # noqa: PLC0415

    places = _write_weights(params, folder / WEIGHTS_FILE)
    for name in programs.columns:
        model = _model(programs, params, places, name)
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        # By its path, as it looks for the weights next to the model.
        onnx.checker.check_model(str(path), full_check=True)
    return {
        "weights": WEIGHTS_FILE,
        "versions": {
            "jax": jax.__version__,
            "onnx": onnx.__version__,
            "opset": OPSET,
        },
    }


def _write_weights(
    params: Mapping[str, np.ndarray], path: pathlib.Path
) -> dict[str, tuple[int, int]]:
    """Where each array stands in the file: its first byte, and how many."""
    places = {}
    with path.open("wb") as file:
        for name, array in params.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            data = np.ascontiguousarray(array).tobytes()
            places[name] = (file.tell(), len(data))
            file.write(data)
    return places


def _model(
    programs: Programs,
    params: Mapping[str, np.ndarray],
    places: Mapping[str, tuple[int, int]],
    name: str,
) -> Any:
    from onnx import TensorProto, helper  # noqa: PLC0415

    from megatransformer_jax.export.onnx_flow import RULES  # noqa: PLC0415
    from megatransformer_jax.export.onnx_graph import (  # noqa: PLC0415
        OPSET,
        Names,
        Scope,
        Value,
        onnx_type,
    )

    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in params.items()}
    inputs, cache = programs.inputs(name), programs.cache
    # Dicts are flattened in the order of their sorted names.
    closed, (results, new_cache) = jax.make_jaxpr(programs.call, return_shape=True)(
        shapes, inputs, cache
    )
    given = {
        key: Value(shape.shape, np.dtype(shape.dtype), key)
        for part in (shapes, inputs, cache)
        for key, shape in part.items()
    }
    scope = Scope(Names(RULES))
    order = [key for part in (shapes, inputs, cache) for key in sorted(part)]
    found = scope.run(closed, [given[key] for key in order])
    names = [*sorted(results), *(f"next_{key}" for key in sorted(new_cache))]
    outputs = dict(zip(names, found, strict=True))
    for key, value in outputs.items():
        scope.nodes.append(helper.make_node("Identity", [scope.name(value)], [key]))
        outputs[key] = Value(value.shape, value.dtype, key)
    wanted = [*programs.outputs(shapes, name), *(f"next_{key}" for key in cache)]
    graph = scope.graph(
        name, [given[key] for key in (*inputs, *cache)], [outputs[key] for key in wanted]
    )
    used = {item for node in graph.node for item in node.input}
    used |= _captured(graph)
    for key, shape in shapes.items():
        if key not in used:
            continue
        tensor = TensorProto(
            name=key,
            data_type=onnx_type(shape.dtype),
            dims=shape.shape,
            data_location=TensorProto.EXTERNAL,
        )
        first, size = places[key]
        for entry, value in (("location", WEIGHTS_FILE), ("offset", first), ("length", size)):
            tensor.external_data.add(key=entry, value=str(value))
        graph.initializer.append(tensor)
    graph.initializer.extend(each for each in scope.names.initializers if each.name in used)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="megatransformer_jax",
        ir_version=11,
    )


def _captured(graph: Any) -> set[str]:
    names: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= {item for inner in attribute.g.node for item in inner.input}
                names |= _captured(attribute.g)
    return names
