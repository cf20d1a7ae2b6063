import pytest
from tpu_programs import looping, straight

from megatransformer_jax.compiled.chips import CHIPS, chip_of
from megatransformer_jax.compiled.collectives import axes_of, replica_groups, slice_mesh
from megatransformer_jax.compiled.program import read_program
from megatransformer_jax.config.option import UserError
from megatransformer_jax.sharding.topology import parse_topology

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
WHOLE = 64 * 256 * 2


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, a=b", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8], dimensions={2}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, a", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert replica_groups(f"channel_id=1, replica_groups={text}", 8) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), ("fsdp",)),
        (((3, 2, 1, 0),), ("fsdp",)),  # Of one slice; any order.
        (((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        ((tuple(range(8)),), ("data", "fsdp")),
        (((0, 1), (2, 3), (4, 5), (6, 7)), ()),
    ],
)
def test_axes_that_groups_follow(groups, axes):
    assert axes_of(groups, MESH) == axes


def test_a_program_runs_on_a_slice_of_the_mesh():
    assert slice_mesh({"data": 4, "fsdp": 4}, 8) == {"data": 2, "fsdp": 4}
    with pytest.raises(UserError, match="runs on 8 devices, and the mesh has data 2 x fsdp 2"):
        slice_mesh({"data": 2, "fsdp": 2}, 8)
    with pytest.raises(UserError, match="give the mesh that it was compiled for"):
        slice_mesh({"data": 1, "fsdp": 16}, 8)


def _read(text, mesh=MESH):
    return read_program(text, mesh, CHIPS["v4"], traced_trips={"core/while": 3})


def test_an_all_reduce_whose_part_leaves_its_fusion_is_a_reduce_scatter():
    scatter = """
%all-reduce-scatter (input: bf16[64,256]) -> bf16[16,256] {
  %input = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,256]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = bf16[16,256]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %partition-id, %zero)
}
"""
    fused = "%z = bf16[16,256]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter\n  "
    reading = _read(
        looping(
            f"{fused}%y = bf16[64,256]{{1,0}} all-gather(%z), replica_groups=[2,4]<=[8], "
            "dimensions={0}",
            devices=8,
            before=scatter,
            bound="bound.2",
        )
    )
    reduced, gathered = reading.collectives
    assert (reduced.kind, reduced.axes, reduced.shape) == ("reduce-scatter", ("fsdp",), (64, 256))
    assert (gathered.kind, gathered.shape, gathered.dtype) == ("all-gather", (64, 256), "bf16")
    for collective in reading.collectives:
        assert (collective.loop, collective.times, collective.group_size) == ("body", 3, 4)
        assert (collective.logical_bytes, collective.wire_bytes) == (WHOLE, 3 / 4 * WHOLE)
    assert reading.wire_bytes == 2 * 3 * 3 / 4 * WHOLE
    # The same operations outside of a fusion send what an all-reduce sends.
    apart = straight(
        """
        %x = bf16[64,256]{1,0} parameter(0)
        %all-reduce.1 = bf16[64,256]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
        %partition-id = u32[] partition-id()
        ROOT %own = bf16[16,256]{1,0} dynamic-slice(%all-reduce.1, %partition-id)
        """,
        devices=8,
    )
    (whole,) = _read(apart).collectives
    assert (whole.kind, whole.axes) == ("all-reduce", ("data", "fsdp"))
    assert whole.wire_bytes == 2 * 7 / 8 * WHOLE


def test_start_and_done_count_once():
    text = straight(
        """
        %x = bf16[16,256]{1,0} parameter(0)
        %s = (bf16[16,256]{1,0}, bf16[64,256]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]
        %d = bf16[64,256]{1,0} all-gather-done(%s)
        %p = (bf16[64,256]{1,0}, bf16[64,256]{1,0}, u32[], u32[]) collective-permute-start(%d), \
source_target_pairs={{0,4},{4,0}}
        ROOT %q = bf16[64,256]{1,0} collective-permute-done(%p)
        """,
        devices=8,
    )
    gathered, permuted = _read(text).collectives
    assert (gathered.logical_bytes, gathered.wire_bytes) == (WHOLE, 3 / 4 * WHOLE)
    assert (permuted.axes, permuted.wire_bytes) == (("data",), WHOLE)
    assert gathered.is_async
    assert permuted.is_async


def test_pieces_in_a_loop_are_counted_where_the_exchange_begins():
    """The TPU compiler repeats the collective in each computation that it puts a piece into."""
    gather = "all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}"
    begin = f"""
%begin (p: bf16[16,256]) -> (bf16[16,256], bf16[64,256]) {{
  %p = bf16[16,256]{{1,0}} parameter(0)
  %all-gather.1 = bf16[64,256]{{1,0}} {gather}
  ROOT %s = (bf16[16,256]{{1,0}}, bf16[64,256]{{1,0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%piece (q: bf16[64,256]) -> bf16[64,256] {{
  %p = bf16[64,256]{{1,0}} parameter(0)
  %all-gather.2 = bf16[64,256]{{1,0}} {gather}
  ROOT %n = bf16[64,256]{{1,0}} negate(%p)
}}
"""
    text = looping(
        "%y = bf16[64,256]{1,0} fusion(%x), kind=kLoop, calls=%piece", devices=8, before=begin
    ).replace(
        "  %start =",
        "  %b = (bf16[16,256]{1,0}, bf16[64,256]{1,0}) fusion(%params), "
        "kind=kCustom, calls=%begin\n  %start =",
    )
    (gathered,) = _read(text).collectives
    assert (gathered.name, gathered.loop, gathered.is_async) == ("all-gather.1", None, True)


def test_what_crosses_slices_is_sent():
    text = straight(
        """
        %x = bf16[64,256]{1,0} parameter(0)
        %token = token[] after-all()
        %send = (bf16[64,256]{1,0}, u32[], token[]) send(%x, %token), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
        ROOT %done = token[] send-done(%send), channel_id=3, is_host_transfer=true
        """,
        devices=8,
    )
    reading = _read(text, MESH | {"data": 4})
    (sent,) = reading.collectives
    assert (sent.kind, sent.wire_bytes, sent.is_between_slices) == ("send", WHOLE, True)
    assert reading.estimate.exchange_s == WHOLE / CHIPS["v4"].dcn_bandwidth


@pytest.mark.parametrize(
    ("groups", "axes", "is_between"),
    [("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), False), ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), True)],
)
def test_what_leaves_a_machine_with_gpus_goes_over_the_network(groups, axes, is_between):
    text = straight(
        f"""
        %x = bf16[64,256]{{1,0}} parameter(0)
        %begin = bf16[64,256]{{1,0}} all-reduce-start(%x), replica_groups={groups}, \
to_apply=%sum, backend_config={{"collective_backend_config":{{"is_sync":true}}}}
        ROOT %done = bf16[64,256]{{1,0}} all-reduce-done(%begin)
        """,
        devices=8,
    )
    chip = chip_of(parse_topology("h100-4", slices=2))
    reading = read_program(text, MESH, chip)
    (reduced,) = reading.collectives
    assert (reduced.axes, reduced.is_between_slices) == (axes, is_between)
    assert not reduced.is_async  # As its settings say, in spite of its name.
    rate = chip.dcn_bandwidth if is_between else chip.ici_bandwidth
    assert reading.estimate.exchange_s == reduced.wire_bytes / rate
