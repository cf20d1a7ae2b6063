"""The smallest model with media, and a batch for it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from megatransformer_jax.config.build import construct
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.data.media.encoding import RowShape, encode_sample, make_batch
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import IMAGE, DTypePolicy

LENGTH = 10
TOKENIZER = MediaTokenizer(BytesTokenizer())
VALUES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "width": 8,
    "max_length": 64,
    "prelude_layers": 1,
    "core_layers": 1,
    "coda_layers": 0,
    "attention": {"num_heads": 2},
    "mlp": {"hidden_width": 8},
    "recurrence": {"mean_steps": 2, "max_steps": 4, "backprop_depth": 1},
    "image": {
        "enabled": True,
        "height": 8,
        "width": 8,
        "channels": 1,
        "patch_size": 4,
        "prelude_layers": 0,
        "coda_layers": 0,
        "context_length": 4,
        "decoder": {
            "unet": {
                "base_width": 8,
                "width_multipliers": (1,),
                "attention_levels": (),
                "head_width": 8,
                "norm_groups": 2,
            },
            "sampler": {"num_steps": 2},
        },
    },
    "audio": {
        "enabled": True,
        "max_frames": 8,
        "prelude_layers": 0,
        "coda_layers": 0,
        "context_length": 4,
        "mel": {
            "sample_rate_hz": 8000,
            "num_mels": 8,
            "fft_samples": 128,
            "window_samples": 128,
            "hop_samples": 64,
        },
        "decoder": {
            "width": 8,
            "head_width": 4,
            "dilations": (1,),
            "sampler": {"num_steps": 2},
        },
    },
}


def make_model():
    """The model and its parameters, drawn at random: to compile their initialisation takes long."""
    config = construct(ModelConfig, VALUES)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
    )


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a clip of random values."""

    kind: int
    is_target: bool = False


def media_batch(model, rows):
    """Rows of (task number, parts), parts being texts and `Medium`; None is a row of padding."""
    formats = MediaFormats.of_model(model.config)
    rng = np.random.default_rng(0)
    encoded = []
    for row in rows:
        if row is None:
            encoded.append(None)
            continue
        parts = tuple(part if isinstance(part, str) else _made(part, rng) for part in row[1])
        encoded.append(encode_sample(Sample(parts), TOKENIZER, formats))
    tasks = [row[0] if row else 0 for row in rows]
    return make_batch(encoded, tasks, RowShape(LENGTH), formats, TOKENIZER.pad_id)


def _made(medium, rng):
    if medium.kind == IMAGE:
        return ImagePart(rng.uniform(-1, 1, (8, 8, 1)).astype(np.float32), medium.is_target)
    wave = rng.uniform(-0.5, 0.5, 64 * 5).astype(np.float32)
    return AudioPart(wave, 8000, is_target=medium.is_target)
