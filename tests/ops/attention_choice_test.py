"""Which kernel is chosen, and what is said when a named one cannot serve."""

import dataclasses

import pytest

from megatransformer_jax.ops.attention import (
    AttentionFeatures,
    UnsupportedKernelError,
    choose_kernel,
    kernel_obstacles,
)

PLAIN = AttentionFeatures("bfloat16", head_width=64, query_length=256, key_length=256)


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", "xla"), ("gpu", "cudnn"), ("tpu", "splash")]
)
def test_auto_takes_the_platforms_fused_kernel(platform, kernel):
    assert choose_kernel("auto", platform, PLAIN) == kernel


# (change, what it says, kernels that still serve)
LIMITS = [
    ({"has_alibi": True}, "ALiBi", set()),
    ({"has_dropout": True}, "dropout", set()),
    ({"row_shards": 2}, "cut over 2 devices", {"splash"}),
    ({"has_softcap": True}, "soft-capping", {"splash"}),
    ({"dtype": "float32"}, "not float32", {"splash"}),
    ({"dtype": "float16"}, "not float16", {"cudnn"}),
    ({"head_width": 72}, None, {"cudnn", "splash"}),
    ({"head_width": 192}, "not 192", {"splash"}),
    ({"head_width": 33}, "not 33", {"splash"}),
    ({"head_width": 260}, "not 260", set()),
    ({"static_offset": None}, "query_offset as a Python int", {"cudnn"}),
    ({"query_length": 1, "key_length": 512, "static_offset": 128}, "T=1", set()),
    ({"query_length": 32, "key_length": 32}, "T=32, S=32", {"cudnn"}),
    ({"query_length": 33, "key_length": 33}, "T=33", {"cudnn"}),
    ({"query_length": 33, "key_length": 33, "has_segments": True}, "T=33, S=33", set()),
    ({"has_segments": True}, None, {"cudnn", "splash"}),
    ({"window": 100}, None, {"cudnn", "splash"}),
    ({"is_causal": False, "window": 100}, None, {"cudnn", "splash"}),
]


@pytest.mark.parametrize(("change", "message", "served"), LIMITS)
@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_limits_fall_back_under_auto_and_are_errors_by_name(
    platform, kernel, change, message, served
):
    features = dataclasses.replace(PLAIN, **change)
    assert choose_kernel("xla", platform, features) == "xla"
    if kernel in served:
        assert choose_kernel("auto", platform, features) == kernel
        assert choose_kernel(kernel, platform, features) == kernel
        return
    assert choose_kernel("auto", platform, features) == "xla"
    with pytest.raises(UnsupportedKernelError, match=message):
        choose_kernel(kernel, platform, features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_shards": 4}, "multiples of 128 on each of 4 devices, not T=256"),
        ({"row_shards": 2, "key_length": 512}, "rows alone, not T=256, S=512, query_offset=0"),
        ({"row_shards": 2, "key_length": 384, "static_offset": 128}, "query_offset=128"),
    ],
)
def test_limits_of_splash_where_rows_are_cut(change, message):
    (obstacle,) = kernel_obstacles("splash", dataclasses.replace(PLAIN, **change))
    assert message in obstacle


def test_error_lists_every_obstacle_and_the_fix():
    features = dataclasses.replace(PLAIN, has_alibi=True, dtype="float32")
    with pytest.raises(UnsupportedKernelError) as error:
        choose_kernel("cudnn", "cpu", features)
    for part in ("does not run on 'cpu'", "ALiBi", "float32", "kernel to 'auto'"):
        assert part in str(error.value)


def test_xla_serves_everything():
    hard = AttentionFeatures(
        "float64", 3, 1, 7, False, 2, None, True, True, True, True, row_shards=8
    )
    assert kernel_obstacles("xla", hard) == []


@pytest.mark.parametrize(
    ("features", "needs"),
    [
        (PLAIN, False),
        (dataclasses.replace(PLAIN, window=5), False),
        (dataclasses.replace(PLAIN, is_causal=False), False),
        (dataclasses.replace(PLAIN, is_causal=False, window=5), True),
        (dataclasses.replace(PLAIN, has_segments=True), True),
        (dataclasses.replace(PLAIN, key_length=300), True),
        (dataclasses.replace(PLAIN, static_offset=None), True),
    ],
)
def test_dense_mask_only_where_cudnn_has_no_own(features, needs):
    assert features.needs_dense_mask == needs


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'flash'; choose one of"):
        choose_kernel("flash", "cpu", PLAIN)
    with pytest.raises(ValueError, match="platform is 'cuda'"):
        choose_kernel("auto", "cuda", PLAIN)
