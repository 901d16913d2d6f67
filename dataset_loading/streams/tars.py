"""Tar files in the layout of WebDataset, read from their beginning to their end, on disk or at an address.

    shard-000000.tar
      0001.jpg  0001.txt  0001.json        the members of a sample stand next to each other and have the same key
      cats/0002.png  cats/0002.json        the key is the path up to the first dot of the name

`tarfile` reads over fsspec: `datasets` and `webdataset` pass over headers that are damaged, and decode what they find,
pickles included. Here nothing but images, recordings, texts and JSON is looked at, and what ends early is an error.
"""

import fnmatch
import json
import math
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset_loading.files import fingerprint
from dataset_loading.layouts import SIDECARS, is_missing
from dataset_loading.left_out import LeftOut
from dataset_loading.remote import describe_refusal, is_remote, open_url
from dataset_loading.sources import Source, find_splits
from dataset_loading.splits import choose_split, group_by_split
from dataset_loading.streams.addresses import RetriedFile
from dataset_loading.streams.rows import RowStream
from dataset_loading.tables import CAPTION_COLUMNS, SPEAKER_COLUMNS, decode_text
from dataset_loading.walking import walk

TAR = ".tar"
DAMAGED = "tar is damaged"  # The beginning of the reason for which a tar is left out.
PEEKED = 16  # Samples whose fields are the columns that flags can name.
BLOCK_BYTES = 1 << 20  # that are read at once
NUMBERS_PER_TAR = 1 << 32  # Numbers of samples do not depend on the tars before theirs.
MAX_TEXT_BYTES = 16 << 20  # A larger text or JSON is none.
UNSAFE = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "bin")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
VERSIONS = ("size", "mtime", "ETag", "LastModified", "etag")  # Of a file, as file systems tell them.


class Tar(NamedTuple):
    """A tar file: where it is, its name in the data set, and what tells its versions apart."""

    url: str
    name: str
    version: list[Any]


class Header(tarfile.TarInfo):
    """A member's header. `tarfile` takes a damaged or missing one after the first for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            reason = "it ends without its end mark" if isinstance(error, tarfile.EmptyHeaderError) else str(error)
            raise tarfile.ReadError(reason) from error


# ---- Finding tars.


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` and `{a,b}.tar` as names."""
    match = RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last, names = match.groups()
    options = names.split(",") if names else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in expand_braces(f"{head}{option}{tail}")]


def is_tars(name: str, suffixes: Collection[str], kind: str) -> bool:
    """Whether a name means tar files: an address, a pattern that ends so, a file, or a folder of them without files of
    the kind and parquet files."""
    if is_remote(name) or (name.lower().endswith(TAR) and (RANGE.search(name) or any(c in name for c in "*?["))):
        return True
    path = Path(name).expanduser()
    if path.is_file():
        return path.suffix.lower() == TAR
    has_tars = path.is_dir() and next(walk(path, [TAR]), None) and not next(walk(path, [".parquet"]), None)
    return bool(has_tars) and not find_splits(path, suffixes, kind)


def find_tars(name: str) -> list[Tar]:
    """The tars of a file, folder, pattern or address, in the order of their names (those of braces as written).

    Raises:
        FileNotFoundError: there are none, or one is missing.
        OSError: they cannot be listed; names what the server refuses.
    """
    urls = expand_braces(name if is_remote(name) else str(Path(name).expanduser().absolute()))
    paths: list[str] = []
    system, _ = open_url(urls[0])
    try:
        for url in urls:
            path = system._strip_protocol(url)
            if any(character in path for character in "*?["):
                paths += sorted(map(str, system.glob(path)))
            elif path.lower().endswith(TAR):
                paths.append(path)
            else:
                files = (str(file) for file in system.find(path))
                paths += sorted(file for file in files if fnmatch.fnmatch(file.lower(), f"*{TAR}"))
        infos = [system.info(path) for path in paths]
    except Exception as error:  # Each protocol has its own.
        raise describe_refusal(name, error) from error
    if not paths:
        raise FileNotFoundError(f"{name} holds no {TAR} files; give a folder, file, pattern or address of them")
    folders = [posixpath.dirname(path) for path in paths]
    common = posixpath.commonpath(folders) if len(set(folders)) > 1 else folders[0]
    versions = [[str(info.get(field)) for field in VERSIONS] for info in infos]
    names = [posixpath.relpath(path, common) if common else path for path in paths]
    return [Tar(system.unstrip_protocol(path), name, version) for path, name, version in zip(paths, names, versions)]


def tars_by_split(name: str) -> dict[str, list[Tar]]:
    """The tars of `find_tars` by the splits that their names say, all of them as `train` where none says one."""
    tars = find_tars(name)
    groups = group_by_split([tar.name for tar in tars], are_media=False) or {"train": list(range(len(tars)))}
    return {split: [tars[index] for index in indices] for split, indices in groups.items()}


def open_tars(name: str, split: str, kind: str, *, suffixes: Collection[str]) -> Source:
    """One split of the samples in tar files; what their names tell of splits holds as elsewhere.

    Args: as of `dataset_loading.sources.open_source`.
    Raises: FileNotFoundError, ValueError, OSError: see `find_tars`, or the split does not exist.
    """
    splits = tars_by_split(name)
    split = choose_split(name, split, list(splits))
    stream = TarStream(splits[split], kind, suffixes)
    # Fields of the first samples; the usual ones may come later.
    columns = dict.fromkeys((kind, "text", "speaker", "offset", "duration"))
    for row in stream.beginning(PEEKED):
        columns |= dict.fromkeys(row)
    place = name if is_remote(name) else str(Path(name).expanduser().resolve())
    source = Source(f"{place}:{split}", "", kind, list(columns), stream, left_out=stream.left_out)
    source.splits = list(splits)
    return source


# ---- Reading them.


class TarStream(RowStream):
    """The samples of tar files as rows: the media column, `text`, `speaker`, and the fields of their JSON.

    Args:
        tars: in their order.
        kind: `"image"` or `"audio"`, the name of the media column.
        suffixes: endings of such files, with the dot.
    Attributes:
        left_out: members that are not read, by reason.
        max_broken_fraction: of the tars that may be damaged.
        share: index (from 1) and number of the shards; each has every n-th tar.
    """

    has_shares = True

    def __init__(self, tars: Sequence[Tar], kind: str, suffixes: Collection[str]):
        super().__init__()
        self.tars, self.n_files, self.kind, self.suffixes = tars, len(tars), kind, suffixes
        self.left_out, self.max_broken_fraction = LeftOut(), 0.0
        self.content = fingerprint([[tar.url, tar.version] for tar in tars])
        self.listing = fingerprint([[tar.name, tar.version[0]] for tar in tars])
        self.counted = self.left_out
        self.index, self.n_in_tar, self.left_out_before = 0, 0, {}

    def beginning(self, n_rows):
        stream = super().beginning(n_rows)
        stream.left_out, stream.share, stream.max_broken_fraction = LeftOut(), (1, 1), 1.0
        return stream

    def state(self):
        return {"tar": self.index, "rows": self.n_in_tar, "left_out": self.left_out_before, "n_own": self.n_own}

    def read(self, start):
        start = start or {"tar": 0, "rows": 0, "left_out": {}, "n_own": 0}
        before = LeftOut.from_dict(start["left_out"])
        self.left_out.counts, self.left_out.names, self.n_own = before.counts, before.names, start["n_own"]
        for index in range(start["tar"], len(self.tars)):
            self.is_own = index % self.share[1] == self.share[0] - 1
            if not self.is_own and self.limit < 0:
                continue
            self.counted = self.left_out if self.is_own else LeftOut()  # Others are read to count their rows.
            self.index, self.n_in_tar, self.left_out_before = index, 0, self.left_out.as_dict()
            self.first_number = (self.base + index) * NUMBERS_PER_TAR
            known = start["rows"] if index == start["tar"] else 0
            for row in self.read_tar(self.tars[index]):
                self.n_in_tar += 1
                if self.n_in_tar > known:
                    yield row

    def read_tar(self, tar: Tar) -> Iterator[dict[str, Any]]:
        """The rows of a tar. Raises: ValueError: too many are damaged; OSError: it cannot be reached."""
        keys, key, members = set(), "", {}
        file = RetriedFile(tar.url)
        try:
            for name, content in self.members(tar, file):
                if (next_key := key_of(name)[0]) != key:
                    if key:
                        yield self.row(tar, key, members, is_again=key in keys)
                        keys.add(key)
                    key, members = next_key, {}
                ending = key_of(name)[1]
                if ending in members:
                    self.counted.add("member is in its tar twice", f"{tar.name}/{name}")
                members.setdefault(ending, content)
            if key:
                yield self.row(tar, key, members, is_again=key in keys)
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            # What was read of a sample when the tar ends may lack a member.
            self.counted.add(f"{DAMAGED}: {error}", tar.name)
            n_damaged = sum(n for reason, n in self.counted.counts.items() if reason.startswith(DAMAGED))
            if n_damaged > math.floor(self.max_broken_fraction * len(self.tars)):
                raise ValueError(
                    f"{tar.url} is damaged near byte {file.position} ({error}): {n_damaged} of {len(self.tars)} tars, "
                    f"more than --max_broken_fraction={self.max_broken_fraction}; copy it again, or allow more"
                ) from error
        finally:
            file.close()

    def members(self, tar: Tar, file: RetriedFile) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the members that samples are made of."""
        known = {suffix.lstrip(".") for suffix in (*self.suffixes, *SIDECARS, ".json")}
        with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES, tarinfo=Header) as opened:  # type: ignore[call-overload]
            while member := opened.next():
                opened.members = []  # It would keep all of them.
                name = posixpath.normpath(member.name)
                base = posixpath.basename(name)
                if member.isdir() or base.startswith((".", "__")):
                    continue
                ending = key_of(name)[1]
                reason = ""
                if not member.isfile():
                    reason = "link, pipe or device in a tar"
                elif not ending:
                    reason = "ending missing is not read"
                elif ending in UNSAFE:
                    reason = f"ending .{ending} may run code and is never read"
                elif ending not in known:
                    reason = f"ending .{ending} is not read"
                elif member.size > MAX_TEXT_BYTES and f".{ending}" not in self.suffixes:
                    reason = f"text in a tar is larger than {MAX_TEXT_BYTES >> 20} MB"
                if reason:
                    self.counted.add(reason, f"{tar.name}/{name}")
                    continue
                content = opened.extractfile(member)
                assert content is not None, "a regular file"
                yield name, content.read()
            # What follows the end mark is zeros, up to a whole record.
            while block := opened.fileobj.read(BLOCK_BYTES):  # type: ignore[union-attr]
                if block.strip(b"\0"):
                    raise tarfile.ReadError("it goes on after its end mark, as tars that were joined by cat do")

    def row(self, tar: Tar, key: str, members: dict[str, bytes], *, is_again: bool) -> dict[str, Any]:
        """The members of a key as a row; one that cannot be read has a `problem` in its media."""
        endings = [ending for ending in members if f".{ending}" in self.suffixes]
        name = f"{tar.name}/{key}"
        for ending in endings[1:]:
            self.counted.add(f"another {self.kind} of the same key", f"{name}.{ending}")
        media: dict[str, Any] = {"path": None, "bytes": None, "row": name}
        if endings:
            media = {"path": f"{name}.{endings[0]}", "bytes": members[endings[0]]}
        if is_again:
            problem = "the key stood in the tar before: its members must be next to each other, and keys differ"
            return {self.kind: {"path": media["path"] or name, "bytes": None, "problem": problem}, "text": ""}
        try:
            return {self.kind: media, **fields_of(members)}
        except ValueError as error:
            return {self.kind: {**media, "path": media["path"] or name, "problem": str(error)}, "text": ""}


def key_of(name: str) -> tuple[str, str]:
    """Key and ending of a member: `a/b` and `seg.png` of a/b.seg.PNG; no ending where the name has no dot."""
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def fields_of(members: dict[str, bytes]) -> dict[str, Any]:
    """Text, speaker and other fields of a sample. A text of its own goes before that in the JSON.

    Raises: ValueError: a text is not UTF-8, or the JSON no object; says which.
    """
    fields: dict[str, Any] = {}
    if "json" in members:
        try:
            fields = json.loads(decode_text(members["json"]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .json cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"its .json holds {str(fields)[:40]!r}, no object")
    for column, usual in (("text", CAPTION_COLUMNS), ("speaker", SPEAKER_COLUMNS)):
        fields[column] = next((fields[name] for name in usual if not is_missing(fields.get(name))), "")
    if "offset" not in fields:  # A duration alone describes the clip.
        fields.pop("duration", None)
    for suffix in SIDECARS:
        if content := members.get(suffix.lstrip(".")):
            fields["text"] = decode_text(content).strip()
            break
    return fields
