"""A batch whose texts come and go gives on a mesh what it gives on one device."""

import jax
import pytest
from driven_batcher import drive
from jax.sharding import PartitionSpec
from tiny_mesh import CAPACITY, MESHES, model_and_params

from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText

TEXTS = [
    RowText(
        [1, *range(5, 6 + number)],
        5,
        depth=4,
        criterion="latent_diff" if number % 2 else "fixed",
        threshold=1.0,
        is_drawn=number > 3,
        seed=number,
    )
    for number in range(9)
]


def given(mesh_name, rows):
    shape = BatchShape(rows, CAPACITY, 4, chunk=4, short_chunks=(3,))
    batcher = Batcher(*model_and_params(mesh_name), None, shape)
    # Chunks in parts and together, and several turns in a launch, too.
    got = drive(batcher, TEXTS, min_waiting=2, arrival=0)
    # Of a row on one device, into a row on another.
    batcher.place(0, TEXTS[8])
    while not batcher.prefill(0):
        pass
    batcher.place(rows - 1, TEXTS[8])
    batcher.copy(0, rows - 1, len(TEXTS[8].ids) - 1)
    batcher.release([0])
    batcher.turn()
    batcher.advance(1, 9)
    (events,) = batcher.turn().fetch()
    return got, int(events.token[rows - 1]), batcher


@pytest.fixture(scope="module")
def wanted():
    return given(None, 4)[:2]


@pytest.mark.parametrize(("mesh_name", "rows"), [("tensor", 4), ("data", 3)])
def test_a_batch_on_a_mesh_equals_one_on_a_device(wanted, mesh_name, rows):
    """With three rows on eight devices nothing is cut."""
    got, copied, batcher = given(mesh_name, rows)
    for one, other in zip(got, wanted[0], strict=True):
        assert (one.token_ids, one.depths) == (other.token_ids, other.depths)
        assert one.score == pytest.approx(other.score, abs=1e-4)
    assert copied == wanted[1] == got[8].token_ids[0]
    is_cut = rows != 3
    cut = ("data", "fsdp") if is_cut else None
    heads = "tensor" if MESHES[mesh_name].tensor > 1 else None
    core = batcher.batch.cache.core
    spec = PartitionSpec(None, cut, heads, None, None)
    assert core.sharding.is_equivalent_to(jax.NamedSharding(core.sharding.mesh, spec), 5)
