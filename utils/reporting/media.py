"""Images and audio inside a page, as base64, within a limit of bytes."""

import base64
import io
import logging
from pathlib import Path

import soundfile
from PIL import Image

from utils.reporting.markup import Markup, tag

logger = logging.getLogger(__name__)

MAX_PNG = 200_000  # bytes; larger images are written as WebP
QUALITY = 88  # of WebP
MAX_SIDE = 2400  # pixels of an image
MAX_SECONDS = 20.0  # of a clip


class Media:
    """Encodes files for one page.

    Args: limit: bytes of base64 in all.
    Attributes:
        left_out: files that would have exceeded the limit, or that could not be read, with the reason.
    """

    def __init__(self, limit: int):
        self.free = limit
        self.left_out: dict[str, str] = {}

    def image(self, source: Path | bytes, description: str) -> Markup | None:
        """An image file, or its bytes, as `<img>`, in its own size at most; None where it is left out."""
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                kind, size = (image.format or "PNG").lower(), image.size
                if kind != "png" or len(content) > MAX_PNG or max(size) > MAX_SIDE:
                    image.thumbnail((MAX_SIDE, MAX_SIDE))
                    stream = io.BytesIO()
                    image.convert("RGB").save(stream, "WEBP", quality=QUALITY)
                    content, kind = stream.getvalue(), "webp"
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG files.
            return self.leave_out(source, description, str(error))
        uri = self.uri(content, f"image/{kind}", source, description)
        if uri is None:
            return None
        return tag("img", src=uri, alt=description, width=size[0], height=size[1], loading="lazy")

    def audio(self, file: Path, description: str) -> Markup | None:
        """An audio file as a player, as FLAC of 16 bits and MAX_SECONDS at most; None where it is left out."""
        try:
            with soundfile.SoundFile(file) as sound:
                rate = sound.samplerate
                samples = sound.read(round(MAX_SECONDS * rate), dtype="float32")
            stream = io.BytesIO()
            soundfile.write(stream, samples, rate, format="FLAC", subtype="PCM_16")
        except (OSError, RuntimeError, ValueError) as error:
            return self.leave_out(file, description, str(error))
        uri = self.uri(stream.getvalue(), "audio/flac", file, description)
        if uri is None:
            return None
        return tag("audio", src=uri, controls=True, preload="metadata", aria_label=description)

    def uri(self, content: bytes, kind: str, source: Path | bytes, description: str) -> str | None:
        """The content as a data URI, where the page has room for it."""
        n_bytes = 4 * -(-len(content) // 3)
        if n_bytes > self.free:
            return self.leave_out(source, description, "the page would become too large")
        self.free -= n_bytes
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    def leave_out(self, source: Path | bytes, description: str, reason: str) -> None:
        """Note a file that the page lacks."""
        name = description if isinstance(source, bytes) else str(source)
        self.left_out[name] = reason
        logger.warning("%s is left out: %s", name, reason)
