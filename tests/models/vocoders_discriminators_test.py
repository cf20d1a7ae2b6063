"""Discriminators hear what they are named after."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.models.vocoders import PeriodDiscriminator, half_rate
from megatransformer_jax.types import DTypePolicy


def test_half_the_rate_is_the_mean_of_pairs() -> None:
    halved = half_rate(jnp.array([[1.0, 3.0, 5.0, 7.0, 9.0]]))
    np.testing.assert_array_equal(halved, [[2.0, 6.0]])


def test_a_column_holds_every_pth_sample_and_columns_do_not_mix() -> None:
    discriminator = PeriodDiscriminator(3, 2, DTypePolicy())
    waveforms = jax.random.normal(jax.random.key(0), (2, 32))

    @jax.jit
    def first_layer(key, waveforms):
        features, _ = discriminator.init_with_output(key, waveforms)
        return features[0]

    before = first_layer(jax.random.key(1), waveforms)
    after = first_layer(jax.random.key(1), waveforms.at[1, 10].add(1.0))
    # 32 samples fill 11 rows of 3; a stride of 3 leaves 4. Sample 10 is in column 1 of its clip.
    assert before.shape == (6, 4, 2)
    changed = np.abs(np.asarray(after - before)).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(changed, [False] * 4 + [True, False])
