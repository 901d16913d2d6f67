"""Files that visitors send: checked by their content, before anything of them is decoded that could be large."""

import io
from pathlib import Path

import soundfile
from PIL import Image, UnidentifiedImageError

from dataset_loading.audio.decoding import AudioReader
from dataset_loading.audio.recording import Recording, read_recording
from dataset_loading.image.pixels import decode_image
from utils.app.arguments import AppArguments

MB = 1_000_000  # bytes
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # names of Pillow
AUDIO_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG", "AIFF")  # names of libsndfile
MAX_CHANNELS = 8  # Compressed silence has thousands of samples a byte, in each channel.


def read_upload(file: str | Path | None, args: AppArguments) -> bytes:
    """The content of an uploaded file.

    Raises: ValueError: there is none, it is empty, or larger than `--max_upload_mb`.
    """
    if not file:
        raise ValueError("no file is given; drop one into the field")
    if not Path(file).is_file():
        raise ValueError(f"{Path(file).name} was deleted, as old uploads are; upload it again")
    size = Path(file).stat().st_size
    if size > args.max_upload_mb * MB:
        raise ValueError(
            f"{Path(file).name} has {size / MB:.1f} MB, more than --max_upload_mb={args.max_upload_mb}; give a "
            "smaller file, or start the page with a higher limit"
        )
    if not size:
        raise ValueError(f"{Path(file).name} is empty; give another file")
    return Path(file).read_bytes()


def read_image(file: str | Path | None, args: AppArguments, background_color: str = "white") -> Image.Image:
    """An uploaded image as 8-bit sRGB, upright, with transparency over the background color.

    Raises: ValueError, OSError: as `read_upload`; it is no image of `IMAGE_FORMATS`, is damaged, or has more than
        `--max_pixels`, of which no pixel is decoded.
    """
    content = read_upload(file, args)
    name = Path(str(file)).name
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:  # reads the header alone
            width, height = image.size
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Readers of formats raise different ones.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" or damaged ({error})"
        raise ValueError(f"{name} is no image of a known format{reason}; give {', '.join(IMAGE_FORMATS)}") from error
    if width * height > args.max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than --max_pixels={args.max_pixels}; make it smaller, or start "
            "the page with a higher limit"
        )
    try:
        return decode_image({"path": None, "bytes": content}, background_color, max_pixels=args.max_pixels)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG files.
        raise ValueError(f"{name}: {error}; save the image again") from error


def read_audio(file: str | Path | None, args: AppArguments, sample_rate: int) -> Recording:
    """An uploaded recording as a waveform (S,) in one channel.

    Args: sample_rate: of the waveform, in Hz.
    Raises: ValueError, OSError: as `read_upload`; it is no audio of `AUDIO_FORMATS`, is damaged, or is longer than
        `--max_seconds`, of which no more is decoded.
    """
    content = read_upload(file, args)
    name = Path(str(file)).name
    media = {"path": None, "bytes": content}
    try:
        info = soundfile.info(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no audio of a known format; give {', '.join(AUDIO_FORMATS)}") from error
    if info.format not in AUDIO_FORMATS or info.channels > MAX_CHANNELS:
        raise ValueError(
            f"{name} is {info.format} audio with {info.channels} channels; give {', '.join(AUDIO_FORMATS)} with at "
            f"most {MAX_CHANNELS}"
        )
    try:
        with AudioReader(media) as reader:
            check_length(reader, name, args)
        return read_recording(media, sample_rate)
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def check_length(reader: AudioReader, name: str, args: AppArguments) -> None:
    """Raises: ValueError: a recording is longer than `--max_seconds`, by its header or as far as it was decoded."""
    limit, n_samples = round(args.max_seconds * reader.sample_rate), 0
    declared = reader.n_samples or 0
    if declared <= limit:
        # A header may lie.
        for block in reader.blocks(reader.sample_rate):
            n_samples += block.shape[1]
            if n_samples > limit:
                break
    if max(n_samples, declared) > limit:
        seconds = f"{declared / reader.sample_rate:.0f}" if declared > limit else f"more than {args.max_seconds:g}"
        raise ValueError(
            f"{name} has {seconds} seconds, more than --max_seconds={args.max_seconds:g}; cut it, or start the page "
            "with a higher limit"
        )
