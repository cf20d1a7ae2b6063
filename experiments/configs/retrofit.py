"""A plain model becomes a recurrent one and is trained on (retrofitting, arXiv 2511.07384).

Command:  megatransformer train --config=retrofit:MODEL
MODEL is the plain model: a run with core_layers=0, a folder of a known format (Llama, Qwen, ...),
or the name of such a model on the Hugging Face hub.

Every option of the model is that of MODEL, and so is the tokenizer. A quarter of its layers become
the prelude, a quarter the coda, and those between them the core; --config.model.core_layers=4 and
its like choose otherwise, and layers that are left over before the core are dropped. At the start
the recurrent model computes at every depth what the plain one does, if no layer is dropped. The
mean depth then grows from 1 to 4 over the first 100 steps.

The text is `pydoc_data.topics`; take your own with --config.data.source and --config.data.files.
Reading MODEL imports JAX, so set environment variables in the shell and not in config.environment.

Expected for a plain model of 6 layers that was trained on the same text for 600 steps: see
docs/tutorials/retrofit.md.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.option import UserError


def get_config(arg: str = "") -> ConfigDict:
    if not arg:
        raise UserError("name the plain model, as in --config=retrofit:my/llama.")
    # They import JAX, which other experiments need not wait for.
    from megatransformer_jax.models.retrofit import retrofit_options  # noqa: PLC0415
    from megatransformer_jax.runs.load import read_model_config  # noqa: PLC0415

    source = read_model_config(arg)
    return ConfigDict(
        {
            "workdir": "runs/retrofit",
            "model": to_dict(source)
            | retrofit_options(source)
            | {
                "recurrence": {
                    "output_norm": False,
                    "mean_steps": 4,
                    "backprop_depth": 4,
                    "ramp": "linear",
                    "ramp_steps": 100,
                }
            },
            "fine_tuning": {"init_from": arg, "retrofit": True},
            "data": {
                "source": "embedded_text",
                "batch_size": 8,
                "sequence_length": min(128, source.max_length),
            },
            "optimizer": {"name": "muon", "learning_rate": 1e-3, "warmup_steps": 20},
            "train": {"steps": 300},
            "checkpoint": {"every_steps": 100},
            "evaluation": {"every_steps": 100, "final_depths": (1, 2, 4, 8)},
            "samples": {"every_steps": 100},
            "logging": {"every_steps": 10},
        }
    )
