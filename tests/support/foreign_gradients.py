"""Loss and gradients of a model that another project's format describes, against its own code."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.checkpoints.foreign import Format
from megatransformer_jax.checkpoints.tensor_map import iterate_tensors
from megatransformer_jax.losses.tokens import token_loss


def check_truncated_gradients(
    model: Any, params: Any, expected: Mapping[str, np.ndarray], format: Format, *, loss_rtol: float
) -> None:
    """Four iterations without gradients, then four with: `loss_n4_k4` and `grad_n4_k4/NAME`."""
    tokens, labels = (jnp.asarray(expected[n], jnp.int32) for n in ("input_ids", "labels"))

    def loss(params):
        output = model.apply(
            {"params": params},
            tokens,
            num_steps=jnp.int32(8),
            backprop_depth=4,
            state=jnp.asarray(expected["initial_state"]),
        )
        sums = token_loss(output.logits, labels, jnp.ones(labels.shape))
        return sums.cross_entropy / sums.tokens

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected["loss_n4_k4"], rtol=loss_rtol)
    ours = dict(iterate_tensors(jax.device_get(gradients), format.links(model.config)))
    prefix = "grad_n4_k4/"
    wanted = {name.removeprefix(prefix) for name in expected if name.startswith(prefix)}
    assert set(ours) == wanted
    for name in wanted:
        theirs = expected[prefix + name]
        error = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (name, error)
