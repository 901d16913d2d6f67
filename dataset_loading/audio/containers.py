"""Audio files as sections that libsndfile decodes to their end.

libsndfile decodes the first of several streams in a file alone, and no further than its guess where an MP3 stream
lacks the header that tells its length. Each stream is therefore a section of its own, with a header where one lacks.
"""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20  # Bytes that are read at once.
FLAC_STREAM = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # Signature, and the head of the first block, of 34 bytes.
# Bit rates of MPEG audio in kbit/s by (version is 1, layer), and sampling rates by version; bits of the frame header.
BIT_RATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLING_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
FEWEST_FRAMES = 3  # Of a further stream; fewer are what a tag happens to hold.
TAG_BYTES = 128  # Of an ID3v1 tag.
MOST_REST = 4096  # Bytes behind the samples of a WAV file that are no chunk, and hardly a part of them.
STREAMED = 0xFFFFFFFF  # The size of what has no end that is known.
MONO = 3  # Channel mode of a frame header.


@dataclasses.dataclass(frozen=True)
class Section:
    """The bytes of one stream: a header that the file lacks, then those in [start, stop) of the file."""

    start: int
    stop: int
    header: bytes = b""


class SectionFile(io.RawIOBase):
    """A section as a file. A seek before its beginning, which some decoders try, is answered with the beginning."""

    def __init__(self, file: BinaryIO, section: Section):
        super().__init__()
        self.file, self.section, self.position = file, section, 0
        self.size = len(section.header) + section.stop - section.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view, header = memoryview(buffer), self.section.header
        n_bytes = min(len(view), max(0, self.size - self.position))
        # What lies in the header, then what lies in the file.
        head = header[self.position : self.position + n_bytes]
        view[: len(head)] = head
        if len(head) < n_bytes:
            self.file.seek(self.section.start + self.position + len(head) - len(header))
            n_bytes = len(head) + (self.file.readinto(view[len(head) : n_bytes]) or 0)  # type: ignore[attr-defined]
        self.position += n_bytes
        return n_bytes


class Window:
    """Bytes of a file at any position, read in large pieces."""

    def __init__(self, file: BinaryIO):
        self.file, self.start, self.content = file, 0, b""
        self.size = file.seek(0, io.SEEK_END)

    def get(self, position: int, n_bytes: int) -> bytes:
        """Up to `n_bytes`, at most CHUNK of them; fewer at the end of the file."""
        offset = position - self.start
        if offset < 0 or offset + n_bytes > len(self.content):
            self.file.seek(position)
            self.start, self.content, offset = position, self.file.read(CHUNK), 0
        return self.content[offset : offset + n_bytes]

    def find(self, pattern: re.Pattern[bytes], start: int, stop: int) -> int:
        """Position of the first match in [start, stop), -1 where there is none; a match has at most 64 bytes."""
        while start < stop:
            piece = self.get(start, min(CHUNK, stop - start))
            if match := pattern.search(piece):
                return start + match.start()
            start += max(1, len(piece) - 64) if start + len(piece) < stop else len(piece) or stop
        return -1


def find_sections(file: BinaryIO, kind: str, subtype: str) -> list[Section]:
    """The sections of a file, in their order.

    Args: kind, subtype: format and encoding in libsndfile's terms, such as "WAV" and "PCM_16".
    Raises: ValueError: a stream is cut off.
    """
    window = Window(file)
    whole = Section(0, window.size)
    if kind == "OGG":
        return ogg_sections(window)
    if kind == "FLAC":
        return between(flac_starts(window), window.size - tag_bytes(window))
    if kind == "MP3":
        return mpeg_sections(window, whole)
    # An MP3 stream in a WAV file is decoded without its wrapping.
    data = wav_data(window) if kind in ("WAV", "WAVEX") else None
    if data and subtype.startswith("MPEG"):
        return mpeg_sections(window, data)
    return [wav_section(window, data)] if data else [whole]


def between(starts: list[int], stop: int) -> list[Section]:
    """Sections from each start to the next one."""
    return [Section(first, last) for first, last in itertools.pairwise([*starts, stop])]


# ---- Ogg, FLAC, WAV.


def ogg_sections(window: Window) -> list[Section]:
    """The links of a chained Ogg file (RFC 3533): each begins with pages that are marked as the first ones.

    Raises: ValueError: the file ends within a page.
    """
    starts, position, was_first = [0], 0, True
    while position < window.size:
        head = window.get(position, 27)
        if not head.startswith(b"OggS") or len(head) < 27:
            # Something else between two pages, or at the end of the file.
            following = window.find(re.compile(rb"OggS\x00"), position + 1, window.size)
            if following < 0:
                break
            position = following
            continue
        lacing = window.get(position + 27, head[26])
        end = position + 27 + head[26] + sum(lacing)
        if len(lacing) < head[26] or end > window.size:
            raise ValueError(f"cut off: the last page of {end - position} bytes has {window.size - position}")
        is_first = bool(head[5] & 2)
        if is_first and not was_first:
            starts.append(position)
        position, was_first = end, is_first
    return between(starts, window.size)


def flac_starts(window: Window) -> list[int]:
    """Where FLAC streams begin; tags may precede the first one."""
    starts, position = [], 0
    while (position := window.find(FLAC_STREAM, position, window.size)) >= 0:
        starts.append(position)
        position += 8
    return [0, *starts[1:]]


def tag_bytes(window: Window) -> int:
    """Size of an ID3v1 tag at the end of a file, damaged frames to the decoder of FLAC; 0: none."""
    return TAG_BYTES if window.get(max(0, window.size - TAG_BYTES), TAG_BYTES).startswith(b"TAG") else 0


def wav_section(window: Window, data: Section) -> Section:
    """The whole of a WAV file, whose header gets the size of the samples where a recorder left it 0.

    Raises: ValueError: the header counts far fewer bytes of samples than there are.
    """
    n_counted, n_more = data.stop - data.start, window.size - data.stop
    is_short = n_more > max(MOST_REST, n_counted // 10) and not begins_chunk(window, data.stop + n_counted % 2)
    if not is_short:
        return Section(0, window.size)
    header = window.get(0, min(CHUNK, data.start))
    if n_counted or len(header) < data.start:
        raise ValueError(
            f"damaged: the header counts {n_counted} bytes of samples, and {n_more} follow that are no chunk of a WAV "
            "file; ffmpeg -ignore_length 1 -i old.wav new.wav reads all of them"
        )
    sizes = [min(n_bytes, STREAMED).to_bytes(4, "little") for n_bytes in (window.size - 8, n_more)]
    return Section(data.start, window.size, header[:4] + sizes[0] + header[8:-4] + sizes[1])


def begins_chunk(window: Window, position: int) -> bool:
    """Whether a chunk of a RIFF file begins here: four printable characters, and a size that fits."""
    head = window.get(position, 8)
    is_named = len(head) == 8 and all(0x20 <= byte < 0x7F for byte in head[:4])
    return is_named and position + 8 + int.from_bytes(head[4:], "little") <= window.size


def wav_data(window: Window) -> Section | None:
    """The content of a WAV file's data chunk."""
    position = 12
    while len(head := window.get(position, 8)) == 8:
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            return Section(position + 8, min(position + 8 + size, window.size))
        position += 8 + size + size % 2
    return None


# ---- MPEG audio.


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of MPEG audio: its first bytes, position and size in bytes, and the kind, which a stream keeps: version,
    layer, sampling rate, and whether it is mono."""

    head: bytes
    position: int
    size: int
    kind: tuple[int, int, int, bool]

    def declared(self) -> int | None:
        """Number of frames of the stream where this is a header that tells it (Xing, Info, VBRI); None: it is not."""
        if self.head[36:40] == b"VBRI":
            return int.from_bytes(self.head[50:54], "big")
        at = 4 + side_bytes(self.kind)
        if self.head[at : at + 4] not in (b"Xing", b"Info"):
            return None
        has_number = bool(int.from_bytes(self.head[at + 4 : at + 8], "big") & 1)
        return int.from_bytes(self.head[at + 8 : at + 12], "big") if has_number else None


def side_bytes(kind: tuple[int, int, int, bool]) -> int:
    """Size of the side information behind a frame's header."""
    version, _, _, is_mono = kind
    return (17 if is_mono else 32) if version == 3 else (9 if is_mono else 17)


def parse_frame(head: bytes, position: int) -> Frame | None:
    """The frame that begins with these bytes; None where they begin none whose size is known."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, bit_rate_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or bit_rate_index in (0, 15):
        return None
    rate = SAMPLING_RATES[version][rate_index]
    bit_rate, padding = 1000 * BIT_RATES[version == 3, layer][bit_rate_index], head[2] >> 1 & 1
    # Frames of layer I have 384 samples in slots of 4 bytes, the others 1152, or 576 in layer III of versions 2, 2.5.
    slots = 72 if layer == 3 and version != 3 else 144
    size = 4 * (12 * bit_rate // rate + padding) if layer == 1 else slots * bit_rate // rate + padding
    return Frame(head, position, size, (version, layer, rate, head[3] >> 6 == MONO))


def mpeg_frames(window: Window, section: Section) -> Iterator[Frame]:
    """The whole frames in a section, without the tags around and between them."""
    position, stop = section.start, section.stop
    while position + 4 <= stop:
        head = window.get(position, 64)
        frame = parse_frame(head, position)
        if frame and position + frame.size <= stop:
            following = window.get(position + frame.size, 4)
            # Two bytes of tags or of noise may look like a frame; a real one has another, a tag or the end behind it.
            if len(following) < 4 or parse_frame(following, 0) or following[:3] in (b"ID3", b"TAG", b"APE", b"LYR"):
                yield frame
                position += frame.size
                continue
        if head.startswith(b"ID3") and len(head) >= 10:
            # The size has 7 bits a byte and leaves out its own 10 bytes; a footer, if flagged, has 10 more.
            size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
            position += 10 + size + 10 * bool(head[5] & 0x10)
            continue
        following = window.find(re.compile(rb"\xff[\xe2-\xff]|ID3[\x02-\x04]"), position + 1, stop)
        if following < 0:
            return
        position = following


def mpeg_sections(window: Window, section: Section) -> list[Section]:
    """The streams of MPEG audio, one after the other, each with a header that tells its number of frames.

    A stream begins at a header, after the last frame that the header before it declares, and where the kind of frames
    changes. A section whose frames cannot be told apart, such as one of free bit rate, is returned as it is.
    """
    sections: list[Section] = []
    streams: list[list[Any]] = []  # Of each stream: first frame, declared number of frames, frames, end.
    for frame in mpeg_frames(window, section):
        declared = frame.declared()
        stream = streams[-1] if streams else None
        is_full = stream and (stream[2] == stream[1] or stream[0].kind != frame.kind)
        if stream is None or declared is not None or is_full:
            streams.append([frame, declared, 0 if declared is not None else 1, frame.position + frame.size])
        else:
            stream[2], stream[3] = stream[2] + 1, frame.position + frame.size
    if len(streams) <= 1 and (not streams or streams[0][1] is not None):
        return [section]
    for first, declared, n_frames, end in streams:
        if n_frames >= FEWEST_FRAMES or len(streams) == 1:
            header = b"" if declared is not None else mpeg_header(first, n_frames)
            sections.append(Section(first.position, end, header))
    return sections


def mpeg_header(frame: Frame, n_frames: int) -> bytes:
    """A frame without sound that tells the number of frames, for a stream that begins with the given one."""
    at, head, size = 4 + side_bytes(frame.kind), b"", 0
    # The smallest frame of the kind that has room for it, without a check sum.
    for bit_rate_index in range(1, 15):
        head = bytes([0xFF, frame.head[1] | 1, bit_rate_index << 4 | frame.head[2] & 0x0D, frame.head[3]])
        size = parse_frame(head, 0).size  # type: ignore[union-attr]
        if size >= at + 12:
            break
    content = head + bytes(at - 4) + b"Xing" + (1).to_bytes(4, "big") + n_frames.to_bytes(4, "big")
    return content + bytes(size - len(content))
