"""What the configurations of all audio models share: the log-mel that they read or write."""

import dataclasses

from model.audio.spectral import MelSettings
from utils.options import StrictConfig, option

MEL_FIELDS = [field.name for field in dataclasses.fields(MelSettings)]


class AudioConfig(StrictConfig):
    """The log-mel's definition, field by field as in `MelSettings`, which `mel` gives whole."""

    sample_rate: int = option(MelSettings.sample_rate, "samples per second", gt=0)
    n_fft: int = option(MelSettings.n_fft, "samples of a frame N", gt=0)
    hop_length: int = option(MelSettings.hop_length, "samples between frames", gt=0)
    n_mels: int = option(MelSettings.n_mels, "mel bins M", gt=0)
    f_min: float = option(MelSettings.f_min, "lower edge of the lowest mel bin in Hz", ge=0)
    f_max: float = option(MelSettings.f_max, "upper edge of the highest mel bin in Hz", gt=0)
    floor: float = option(MelSettings.floor, "smallest mel magnitude, the logarithm of silence", gt=0)

    @property
    def mel(self) -> MelSettings:
        """The definition as one value."""
        return MelSettings(**{name: getattr(self, name) for name in MEL_FIELDS})

    def validate_mel(self):
        _ = self.mel  # MelSettings checks itself.
