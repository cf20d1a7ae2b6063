"""Depth-recurrent transformers in JAX: a few layers, applied as many times as you ask for.

    import megatransformer_jax as mt

    lm = mt.load("runs/recurrent")
    print(lm.generate("The if statement", depth=16, strategy="greedy").text)

Importing this module loads neither JAX nor NumPy; the first use of a name does. Names that are not
in `__all__` are private and may be moved.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatransformer_jax.api import (
        Trainer,
        configure,
        create,
        evaluate,
        export_program,
        inspect,
        load,
        read_metrics,
    )
    from megatransformer_jax.config.generation import GenerationConfig
    from megatransformer_jax.config.model import ModelConfig
    from megatransformer_jax.config.option import UserError
    from megatransformer_jax.config.run import RunConfig
    from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
    from megatransformer_jax.data.tokenizer import (
        BytesTokenizer,
        SentencePieceTokenizer,
        Tokenizer,
    )
    from megatransformer_jax.evaluation.lens import Trace
    from megatransformer_jax.evaluation.report import Report
    from megatransformer_jax.generation.request import Completion
    from megatransformer_jax.model import Model, Output
    from megatransformer_jax.serving.server import Server, serve
    from megatransformer_jax.types import Batch

# Where each name is.
_PLACES = {
    "api": (
        "Trainer",
        "configure",
        "create",
        "evaluate",
        "export_program",
        "inspect",
        "load",
        "read_metrics",
    ),
    "config.generation": ("GenerationConfig",),
    "config.model": ("ModelConfig",),
    "config.option": ("UserError",),
    "config.run": ("RunConfig",),
    "data.hf_tokenizer": ("HuggingFaceTokenizer",),
    "data.tokenizer": ("BytesTokenizer", "SentencePieceTokenizer", "Tokenizer"),
    "evaluation.lens": ("Trace",),
    "evaluation.report": ("Report",),
    "generation.request": ("Completion",),
    "model": ("Model", "Output"),
    "serving.server": ("Server", "serve"),
    "types": ("Batch",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [  # noqa: RUF022 (as people meet them)
    "load",
    "create",
    "configure",
    "evaluate",
    "inspect",
    "export_program",
    "serve",
    "read_metrics",
    "Model",
    "Trainer",
    "GenerationConfig",
    "ModelConfig",
    "RunConfig",
    "Batch",
    "Completion",
    "Output",
    "Report",
    "Server",
    "Trace",
    "Tokenizer",
    "BytesTokenizer",
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _MODULE_OF:
        from megatransformer_jax.config.option import nearest_hint  # noqa: PLC0415

        hint = nearest_hint(name, __all__)
        problem = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(f"{problem}; {hint.strip()}" if hint else problem)
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__")), "__version__"])
