"""Each kind of run has its own options; configurations of version 0.1 had those of all kinds."""

import pytest

from megatransformer_jax.config.build import build, merge, to_dict
from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import VaeRunConfig, VocoderRunConfig
from megatransformer_jax.config.vocoder import VocoderConfig

CLASSES = {"transformer": RunConfig, "vocoder": VocoderRunConfig, "image_vae": VaeRunConfig}
# What version 0.1 wrote into config.json: all sections, and what the kind had to say.
EVERYTHING = to_dict(RunConfig()) | {
    "vocoder": to_dict(VocoderConfig()),
    "image_vae": to_dict(ImageVaeRunConfig()),
}
SAID = {
    "transformer": {},
    "vocoder": {"media": {"tasks": ["speak=1"]}},
    "image_vae": {"media": {"tasks": ["draw=1"]}},
}


def old_config(kind, **changes):
    said = {"source": "media", "tokenizer": {"kind": "bytes"}} if SAID[kind] else {}
    values = merge(EVERYTHING, {"kind": kind, "data": SAID[kind] | said})
    return merge(values, changes)


@pytest.mark.parametrize(("kind", "run_class"), CLASSES.items())
def test_a_configuration_of_version_0_1_still_loads(kind, run_class):
    new = build({"kind": kind, "train": {"steps": 60}})
    assert type(new) is run_class
    assert build(old_config(kind, train={"steps": 60})) == new
    assert build(to_dict(new)) == new


def test_slots_that_no_task_fills_load_from_a_run_of_version_0_1_alone():
    model = {"max_length": 256, "image": {"enabled": True}}
    data = {"source": "media", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}
    media = to_dict(RunConfig())["data"]["media"]
    media |= {"tasks": ["draw=1", "caption=2"], "images_per_row": 2}
    said = {"model": model, "data": data | {"media": media}}
    with pytest.raises(ConfigError, match="images_per_row: 2, but the rows of draw, caption"):
        build(said)
    del media["documents"]
    assert build(said).data.media.images_per_row == 1
    media["tasks"] = ["which=1"]
    assert build(said).data.media.images_per_row == 2
    with pytest.raises(ConfigError, match=r"kind: \{\} is not allowed"):
        build({"kind": {}})


@pytest.mark.parametrize("kind", ["vocoder", "image_vae"])
def test_a_kind_has_no_options_of_another(kind):
    values = to_dict(build({"kind": kind}))
    assert {"vocoder", "image_vae"} & values.keys() == {kind}
    assert not {"model", "preset", "fine_tuning", "diagnostics"} & values.keys()
    assert not {"source", "tokenizer", "sequence_length"} & values["data"].keys()
    (medium,) = values["data"]["media"].values()
    assert "augmentation" not in medium
    assert "depth" not in values["samples"] and "z_loss" not in values["train"]
    assert values["mesh"].keys() == {"data", "fsdp"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocoder": {"width": 64}}, "vocoder.width: 64 .* kind='transformer'; set kind='vocoder'"),
        (
            {"kind": "vocoder", "image_vae": {"loss": {"kl_weight": 0.1}}},
            "image_vae.loss.kl_weight: 0.1 would be ignored with kind='vocoder'; set kind='image_v",
        ),
        ({"kind": "vocoder", "preset": "tiny"}, "preset: 'tiny' .* leave it at None"),
        ({"kind": "vocoder", "train": {"z_loss": 0.1}}, "train.z_loss: 0.1 .* leave it at 0.0"),
        ({"kind": "image_vae", "samples": {"depth": 3}}, "samples.depth: 3 would be ignored"),
        ({"kind": "vocoder", "data": {"source": "text"}}, "data.source: 'text' would be ignored"),
        (
            {"kind": "vocoder", "data": {"media": {"tasks": ["transcribe=1"]}}},
            "data.media.tasks: .'transcribe=1',. would be ignored",
        ),
        (
            {"kind": "vocoder", "data": {"media": {"images": {"source": "photographs"}}}},
            "photographs' .* set kind='transformer' or 'image_vae'",
        ),
        (
            {
                "kind": "image_vae",
                "data": {"media": {"images": {"augmentation": {"flip_rate": 1}}}},
            },
            "data.media.images.augmentation.flip_rate: 1 would be ignored",
        ),
        ({"kind": "vocodr"}, "kind: 'vocodr' is not allowed; did you mean 'vocoder'.*'image_vae'"),
        ({"kind": "vocoder", "vocodr": {}}, "vocodr: no such option; did you mean 'vocoder'"),
    ],
)
def test_what_belongs_to_another_kind_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(values)
