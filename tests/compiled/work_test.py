import pytest
from tpu_programs import straight

from megatransformer_jax.compiled.chips import CHIPS, chip_of
from megatransformer_jax.compiled.hlo import parse_hlo
from megatransformer_jax.compiled.program import read_program
from megatransformer_jax.compiled.work import hbm_bytes, product_flops
from megatransformer_jax.sharding.topology import parse_topology

X = "bf16[2,128,64,1,1]{1,2,4,3,0:T(8,128)(2,1)}"


@pytest.mark.parametrize(
    ("operation", "flops"),
    [
        # [2, 128, 64] times [2, 128, 4, 3, 16] over the first two, as the TPU compiler writes it.
        (
            "bf16[64,4,3,16,1]{0,3,2,1,4} convolution(%x, %y), "
            "window={size=4x3x2 pad=3_3x2_2x0_0 rhs_reversal=1x1x0}, "
            "dim_labels=2fb01_2i01o->b01f2",
            2 * 2 * 128 * 64 * 4 * 3 * 16,
        ),
        # Every second place of a padded row of 8, three places at a time: 2 + 3 + 3 + 3 pairs.
        (
            "f32[2,4,5]{2,1,0} convolution(%row, %kernel), "
            "window={size=3 stride=2 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 2 * 5 * 7 * (2 + 3 + 3 + 3),
        ),
        # A transposed convolution: of 16 places of the input with gaps only 8 hold something.
        (
            "f32[2,16,5]{2,1,0} convolution(%row, %kernel), "
            "window={size=3 pad=1_2 lhs_dilate=2}, dim_labels=b0f_0io->b0f",
            2 * 2 * 5 * 7 * (8 + 8 + 7),
        ),
        (
            "f32[8,3,9]{2,1,0} dot(%left, %right), lhs_batch_dims={0}, rhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
            2 * 8 * 3 * 9 * 6,
        ),
        ("bf16[2,128,64,1,1]{1,2,4,3,0} negate(%x)", 0),
    ],
)
def test_flops_of_products(operation, flops):
    text = straight(
        f"""
        %x = {X} parameter(0)
        %y = bf16[2,128,4,3,16]{{1,4,3,2,0}} parameter(1)
        %row = f32[2,8,7]{{2,1,0}} parameter(2)
        %kernel = f32[3,7,5]{{2,1,0}} parameter(3)
        %left = f32[8,3,6]{{2,1,0}} parameter(4)
        %right = f32[8,6,9]{{2,1,0}} parameter(5)
        ROOT %z = {operation}
        """
    )
    main = parse_hlo(text).main
    assert product_flops(main, main.ops["z"]) == flops


@pytest.mark.parametrize(
    ("name", "products", "mask", "tiles"),
    [
        ("splash_mha_fwd_residuals", 2, "constant({ { { 1, 0 }, { 2, 1 } } })", 3),
        ("splash_mqa_dq_no_residuals", 3, "constant({ { { 2, 2 }, { 2, 2 } } })", 4),
        ("splash_mha_dkv", 4, "constant({...})", 3),  # Too long to be printed: causal.
        ("another_kernel", 0, "constant({ { { 1, 0 }, { 2, 1 } } })", 0),
    ],
)
def test_flops_of_attention_kernels(name, products, mask, tiles):
    heads = "bf16[8,4,1024,64]{3,2,1,0}"
    text = straight(
        f"""
        %q = {heads} parameter(0)
        %next = s8[1,2,2]{{2,1,0}} constant({{ {{ {{ 0, 0 }}, {{ 0, 1 }} }} }})
        %mask = s8[1,2,2]{{2,1,0}} {mask}
        ROOT %{name}.3 = (f32[8,512,128]{{2,1,0}}, {heads}) custom-call(%next, %mask, %q, %q, %q), \
custom_call_target="tpu_custom_call"
        """
    )
    reading = read_program(text, {"data": 1}, CHIPS["v4"])
    assert reading.flops == reading.kernel_flops == 2 * products * 8 * 4 * tiles * 512 * 512 * 64
    assert [kernel.name for kernel in reading.kernels] == [name]


@pytest.mark.parametrize(
    ("rows", "keys", "grid", "mask", "pairs"),
    [
        # 768 rows in tiles of 256, 1024 keys in tiles of 512.
        (768, 1024, "1,3,2", "{ { { 1, 0 }, { 1, 0 }, { 2, 1 } } }", 4 * 256 * 512),
        # A window of 512: of 8 x 8 tiles only 2 columns are in the grid.
        (4096, 4096, "1,8,2", "{ { { 1, 0 }" + ", { 1, 1 }" * 7 + " } }", 15 * 512 * 512),
        # Two heads with their own masks.
        (512, 512, "2,1,1", "{ { { 1 } }, { { 0 } } }", 512 * 512 / 2),
    ],
)
def test_tiles_of_kernels(rows, keys, grid, mask, pairs):
    text = straight(
        f"""
        %q = bf16[2,{rows},64]{{2,1,0}} parameter(0)
        %k = bf16[2,{keys},64]{{2,1,0}} parameter(1)
        %mask = s8[{grid}]{{2,1,0}} constant({mask})
        ROOT %splash_mha_fwd.1 = bf16[2,{rows},64]{{2,1,0}} custom-call(%mask, %mask, %q, %k, %k), \
custom_call_target="tpu_custom_call"
        """
    )
    assert read_program(text, {"data": 1}, CHIPS["v4"]).flops == 2 * 2 * 2 * pairs * 64


PADDED = 4 * 8 * 1024 * 128 * 2  # 64 of 128 lanes are used.
CACHE, PART = "bf16[4,8,1024,64]{3,2,1,0:T(8,128)(2,1)}", "bf16[4,8,1,64]{3,2,1,0:T(1,128)(2,1)}"
CUT = 4 * 8 * 64 * 2
FUSED = f"""
%fill (a: {CACHE}, b: {PART}, i: s32[]) -> {CACHE} {{
  %a = {CACHE} parameter(0)
  %b = {PART} parameter(1)
  %i = s32[] parameter(2)
  %old = {PART} dynamic-slice(%a, %i, %i, %i, %i), dynamic_slice_sizes={{4,8,1,64}}
  %new = {PART} add(%old, %b)
  ROOT %all = {CACHE} dynamic-update-slice(%a, %new, %i, %i, %i, %i)
}}

%all_of_it (a.1: {CACHE}) -> {CACHE} {{
  %a.1 = {CACHE} parameter(0)
  ROOT %doubled = {CACHE} add(%a.1, %a.1)
}}
"""


@pytest.mark.parametrize(
    ("operation", "moved"),
    [
        (f"{CACHE} negate(%cache)", 2 * PADDED),
        (f"{CACHE} fusion(%cache), kind=kLoop, calls=%all_of_it", 2 * PADDED),
        # A part is read, added to another and written to its place.
        (f"{CACHE} fusion(%cache, %part, %i), kind=kLoop, calls=%fill", 2 * CUT + 2 * CUT),
        (f"{PART} dynamic-slice(%cache, %i, %i, %i, %i)", 2 * CUT + CUT),
        (f"{CACHE} dynamic-update-slice(%cache, %part, %i, %i, %i, %i)", 2 * CUT + CUT),
        # From memory on the chip nothing is read.
        ("bf16[4,8,1024,64]{3,2,1,0:T(8,128)(2,1)} negate(%near)", PADDED),
        ("(bf16[4,8,1024,64]{2,3,1,0:T(8,128)(2,1)S(3)}, u32[]) copy-start(%near)", 4),
        (f"({CACHE}) tuple(%cache)", 0),
    ],
)
def test_bytes_of_operations(operation, moved):
    text = straight(
        f"""
        %cache = {CACHE} parameter(0)
        %part = {PART} parameter(1)
        %i = s32[]{{:S(6)}} parameter(2)
        %near = bf16[4,8,1024,64]{{2,3,1,0:T(8,128)(2,1)S(3)}} parameter(3)
        ROOT %z = {operation}
        """,
        before=FUSED,
    )
    module = parse_hlo(text)
    assert hbm_bytes(module, module.main.ops["z"]) == moved


MATMUL = """
%c = (bf16[4,8,32]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
"""


def test_calls_of_cublas_are_products():
    """The room that cuBLAS is given to work in is not traffic."""
    text = straight(
        f"""
        %a = bf16[4,8,64]{{2,1,0}} parameter(0)
        %b = bf16[4,64,32]{{2,1,0}} parameter(1)
        {MATMUL.strip()}
        ROOT %result = bf16[4,8,32]{{2,1,0}} get-tuple-element(%c), index=0
        """
    )
    reading = read_program(text, {"data": 1}, chip_of(parse_topology("h100-1")))
    assert reading.flops == 2 * 4 * 8 * 32 * 64
    assert reading.hbm_bytes == 2 * (4 * 8 * 64 + 4 * 64 * 32 + 4 * 8 * 32)


@pytest.mark.parametrize(
    ("target", "mask", "products", "share"),
    [
        ("__cudnn$fmhaSoftmax", "CAUSAL", 2, 257 / 512),
        ("__cudnn$fmhaScaleBiasSoftmax", "NO_MASK", 2, 1),
        ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 5, 257 / 512),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "NO_MASK", 5, 1),
    ],
)
def test_flops_of_cudnns_attention(target, mask, products, share):
    text = straight(
        f"""
        %q = bf16[8,256,4,16]{{3,2,1,0}} parameter(0)
        %k = bf16[8,256,2,16]{{3,2,1,0}} parameter(1)
        ROOT %fused.4 = (bf16[8,4,256,16]{{3,1,2,0}}, u8[64]{{0}}) custom-call(%q, %k, %k), \
custom_call_target="{target}", backend_config={{"cudnn_fmha_backend_config": \
{{"fmha_scale": 0.25, "is_flash_attention": true, "mask_type": "{mask}"}}}}
        """
    )
    reading = read_program(text, {"data": 1}, chip_of(parse_topology("h100-1")))
    assert reading.flops == 2 * products * 8 * 4 * 256 * 256 * share * 16
    assert [kernel.flops for kernel in reading.kernels] == [reading.flops]
    assert reading.hbm_bytes == 2 * 8 * 256 * 16 * (4 + 2 + 4)


def test_chips_of_slices_and_machines():
    assert chip_of(parse_topology("v5litepod-16")) is CHIPS["v5e"]
    gpu = chip_of(parse_topology("a100-40gb-4", slices=2))
    assert (gpu.platform, gpu.linked, gpu.hbm_bytes) == ("gpu", 4, 30 * 2**30)
    assert CHIPS["v4"].platform == "tpu"
