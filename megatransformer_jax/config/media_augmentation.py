"""Random changes of training images and clips, as frozen dataclasses."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class ImageAugmentationConfig:
    """Changes of the images of the training split, drawn anew for each row from data.seed.

    Images that the model captions are changed. Validation sees them as they are.
    """

    flip_rate: float = option(
        0.0, "Probability that an image is mirrored, left to right.", minimum=0, maximum=1
    )
    max_shift: float = option(
        0.0,
        "Largest shift along each side, as a share of that side; the edge is continued.",
        minimum=0,
        maximum=0.5,
    )
    max_rotation_deg: float = option(
        0.0, "Largest rotation either way, in degrees.", minimum=0, maximum=180
    )
    max_zoom: float = option(
        0.0, "Largest relative change of size: 0.1 is 1/1.1 to 1.1.", minimum=0, maximum=1
    )
    min_crop: float = option(
        1.0,
        "Smallest share of each side that a random crop keeps, which then fills the image. 1: off.",
        above=0,
        maximum=1,
    )
    max_brightness: float = option(
        0.0, "Largest change of all pixels, which are in [-1, 1].", minimum=0, maximum=1
    )
    max_contrast: float = option(
        0.0, "Largest relative change of the distance from the mean.", minimum=0, below=1
    )
    max_saturation: float = option(
        0.0, "Largest relative change of the distance from grey (RGB only).", minimum=0, maximum=1
    )
    targets: bool = option(
        False, "Changes the images that the model learns to draw as well, which it then draws so."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_images(self) -> bool:
        """Whether any image changes."""
        return any(
            getattr(self, field.name) != field.default
            for field in dataclasses.fields(self)
            if field.name != "targets"
        )

    @rule("targets")
    def _targets_need_changes(self) -> None:
        """True only with another option that changes images."""
        if self.targets and not self.changes_images:
            raise ConfigError(
                "targets",
                "True would be ignored, because no image is changed; set another option of this "
                "section, or leave it False.",
            )


@dataclasses.dataclass(frozen=True)
class AudioAugmentationConfig:
    """Changes of the clips that the model transcribes in training, drawn anew for each row.

    Clips that the model learns to make, and those of validation, stay as they are.
    """

    max_speed: float = option(
        0.0,
        "Largest relative change of speed, and of pitch with it: 0.1 is 1/1.1 to 1.1. A clip is "
        "never slowed beyond model.audio.max_frames.",
        minimum=0,
        maximum=1,
    )
    max_gain_db: float = option(
        0.0, "Largest change of loudness either way, in dB; clipped at full scale.", minimum=0
    )
    noise_rate: float = option(0.0, "Probability that white noise is added.", minimum=0, maximum=1)
    min_snr_db: float = option(10.0, "Loudest noise: signal to noise ratio, in dB.")
    max_snr_db: float = option(30.0, "Softest noise: signal to noise ratio, in dB.")
    time_masks: int = option(
        0, "SpecAugment (arXiv 1904.08779): stretches of frames set to the mean.", minimum=0
    )
    max_time_mask: float = option(
        0.1, "Longest stretch, as a share of the clip.", above=0, maximum=1
    )
    frequency_masks: int = option(0, "SpecAugment: bands of mel bins set to the mean.", minimum=0)
    max_frequency_mask: int = option(10, "Widest band, in mel bins.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_waveforms(self) -> bool:
        """Whether waveforms change before their spectrograms are made."""
        return bool(self.max_speed or self.max_gain_db or self.noise_rate)

    @property
    def changes_clips(self) -> bool:
        """Whether any clip changes."""
        return self.changes_waveforms or bool(self.time_masks or self.frequency_masks)

    @rule("min_snr_db", "max_snr_db")
    def _noise_range_is_one(self) -> None:
        """min_snr_db at most max_snr_db; at their defaults with noise_rate=0."""
        if self.min_snr_db > self.max_snr_db:
            raise ConfigError(
                "min_snr_db",
                f"{self.min_snr_db} exceeds max_snr_db={self.max_snr_db}; lower it.",
            )
        self._only_with("noise_rate", "min_snr_db", "max_snr_db")

    @rule("max_time_mask", "max_frequency_mask")
    def _widths_need_masks(self) -> None:
        """At their defaults without time_masks, frequency_masks."""
        self._only_with("time_masks", "max_time_mask")
        self._only_with("frequency_masks", "max_frequency_mask")

    def _only_with(self, switch: str, *names: str) -> None:
        for name in names:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if not getattr(self, switch) and value != default:
                raise ConfigError(
                    name,
                    f"{value!r} would be ignored with {switch}=0; set {switch}, or leave it at "
                    f"{default!r}.",
                )
