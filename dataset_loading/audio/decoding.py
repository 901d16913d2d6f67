"""Decoding of audio files, block by block, with everything checked that the decoder passes over.  S samples."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import soundfile
import torch
from torch import Tensor

from dataset_loading.audio.aac import without_av
from dataset_loading.audio.containers import Section, SectionFile, find_sections
from dataset_loading.sources import open_media

BLOCK_SAMPLES = 1 << 22  # of one channel that are decoded at once
STREAMED_BYTES = 0x7FFF0000  # A length from here on is the placeholder of a program that did not know it.
RATES = (1_000, 10_000_000)  # Hz; a header with another one is damaged: a second of it would become hours, or nothing.
# libsndfile reads what is there of a file that was cut off, and mentions in its log alone what should be there.
CUT_OFF = re.compile(r"(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)")
CUT_OFF_SAMPLES = re.compile(r"(?:Frames|Cols)\s*: (\d+)(?!.*(?:Frames|Cols)\s*: )", re.DOTALL)
SPHERE_SAMPLES = re.compile(rb"sample_count -i (\d+)")


class DecodedAudio(NamedTuple):
    """All channels of a file, (channels, S) float32, and the sampling rate in Hz."""

    samples: Tensor
    sample_rate: int


def decode_audio(media: dict[str, Any] | None) -> DecodedAudio:
    """Decode a whole file of any format that libsndfile reads; see `AudioReader` for arguments and errors."""
    with AudioReader(media) as reader:
        blocks = list(reader.blocks())
        return DecodedAudio(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1), reader.sample_rate)


class StreamFile(soundfile.SoundFile):
    """A file that is read once from its beginning. The package would seek after each block, which changes the samples
    of some formats and is an error in others."""

    def seekable(self) -> bool:
        return False


class AudioReader:
    """An audio file of any format that libsndfile reads, which is decoded in blocks.

    Args: media: `{"path": ..., "bytes": ...}`, see `open_media`.
    Attributes:
        sample_rate: in Hz.
        n_channels: number of channels.
        n_samples: of one channel; None where the file does not tell it.
        is_float: whether samples are stored as floating-point numbers, which may exceed full scale.
    Raises: OSError, ValueError: the file is missing, damaged, cut off, or no audio; the message says which.
    """

    def __init__(self, media: dict[str, Any] | None):
        self.file = without_av(open_media(media))
        try:
            self.n_bytes = self.file.seek(0, 2)
            with self.open(Section(0, self.n_bytes)) as file:
                self.sample_rate, self.n_channels = file.samplerate, file.channels
                self.is_float = file.subtype in ("FLOAT", "DOUBLE")
                if not RATES[0] <= self.sample_rate <= RATES[1]:
                    least, most = RATES
                    raise ValueError(
                        f"damaged: a sampling rate of {self.sample_rate} Hz, not between {least} and {most}; correct "
                        "the header, such as with ffmpeg -ar"
                    )
                self.check_log(file)
                kind, subtype = file.format, file.subtype
            self.sections = find_sections(self.file, kind, subtype)
            self.n_samples = self.count_samples()
        except soundfile.LibsndfileError as error:
            self.file.close()
            raise self.unreadable(error) from error
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def open(self, section: Section) -> StreamFile:
        """One section, from its beginning."""
        return StreamFile(SectionFile(self.file, section))

    def unreadable(self, error: soundfile.LibsndfileError) -> ValueError:
        reason = error.error_string
        return ValueError(f"no audio of a known format, or damaged ({self.n_bytes} bytes): {reason}")

    def count_samples(self) -> int | None:
        """Samples of all sections. Raises: ValueError: they differ in rate or number of channels."""
        total = 0
        for section in self.sections:
            with self.open(section) as file:
                if (file.samplerate, file.channels) != (self.sample_rate, self.n_channels):
                    raise ValueError(
                        f"streams of {self.sample_rate} Hz with {self.n_channels} channels and of {file.samplerate} "
                        f"Hz with {file.channels} in one file; save each to a file of its own"
                    )
                total += file.frames
        return total if total < 1 << 40 else None

    def blocks(self, n_samples: int = BLOCK_SAMPLES) -> Iterator[Tensor]:
        """The samples in order, (channels, at most `n_samples`) float32.

        Raises: ValueError: there are none, fewer than the file says, or some that are no finite numbers.
        """
        total = 0
        for section in self.sections:
            try:
                with self.open(section) as file:
                    n_read = 0
                    while n_block := len(block := file.read(n_samples, dtype="float32", always_2d=True)):
                        n_read += n_block
                        samples = torch.from_numpy(block).T
                        # A finite sum has finite terms alone.
                        if not samples.sum().isfinite() and not samples.isfinite().all():
                            raise ValueError("damaged: samples that are no finite numbers")
                        yield samples
                    if n_read != file.frames and file.frames < 1 << 40:
                        raise ValueError(f"damaged: {n_read} of {file.frames} samples can be read")
            except soundfile.LibsndfileError as error:
                raise self.unreadable(error) from error
            total += n_read
        if not total:
            raise ValueError(f"no samples in a file of {self.n_bytes} bytes")

    def check_log(self, file: soundfile.SoundFile) -> None:
        """Raises: ValueError: the file was cut off, by libsndfile's log or by a header that it does not read."""
        log, kind = file.extra_info, file.format
        sizes = CUT_OFF.search(log)
        n_promised, n_present = map(int, sizes.groups()) if sizes else (0, 0)
        if n_present < n_promised < STREAMED_BYTES:
            raise ValueError(f"cut off: {n_present} of {n_promised} bytes of samples are there")
        # Headers of other formats state the number of samples.
        promised = CUT_OFF_SAMPLES.search(log) if kind in ("AVR", "MAT4", "MAT5") else None
        if kind == "NIST":
            self.file.seek(0)
            promised = SPHERE_SAMPLES.search(self.file.read(1024))
        if promised and file.frames < int(promised[1]):
            raise ValueError(f"cut off: {file.frames} of {int(promised[1])} samples are there")
        if "to be a truncated file" in log:
            raise ValueError("cut off: the file ends within its samples")
