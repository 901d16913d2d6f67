"""Raw datasets: hub names and local folders, listed but not decoded, so that a broken file stops nothing.

Local layouts:

    folder/[train|validation|test/]**/*.png          files, with their parent folder as `label`
    folder/[train|validation|test/]metadata.csv      columns file_name, text, ...; also .tsv, .jsonl, .json, .parquet
    folder/metadata.csv                              next to split folders: file_name begins with the split's folder
    folder/train.jsonl, folder/test.jsonl            one index per split, or shards (train-00); also .csv, .tsv, .json
    folder/metadata.csv                              with a column `split` that holds train, val, test, ...
    index.jsonl                                      an index alone

Texts that lie beside the files (`a.txt`, LibriSpeech, VCTK) and the tables of LJSpeech, Common Voice, NeMo and Whisper
are read by `dataset_loading/layouts.py`.

A table may name files of several kinds in columns `image` and `audio`; its rows are then known by their numbers, so
that what comes from one row belongs together. A row whose cell is empty has no file of that kind.

Everything else (hub names, parquet files, archives, `save_to_disk` folders) goes through the `datasets` package. Local
layouts do not, because its `imagefolder` leaves files out where a few names happen to contain "train" or "test",
turns the captions "None" and "null" into nothing, finds nothing in folders with brackets in their names, and its
`audiofolder` needs FFmpeg even for listing.
"""

import dataclasses
import io
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import fsspec

from dataset_loading.layouts import (
    SideTexts,
    check_file_name,
    find_file,
    is_missing,
    lists_files,
    read_records,
    without_second_microphone,
)
from dataset_loading.left_out import LeftOut, survey_folder
from dataset_loading.splits import (
    SPLIT_NAMES,
    choose_split,
    group_by_column,
    group_by_split,
    held_out_folders,
    is_held_out,
    split_of_name,
)
from dataset_loading.streams.hub import FILE_BUILDERS, KINDS, load_rows
from dataset_loading.streams.rows import RowStream
from dataset_loading.tables import suffix_of
from dataset_loading.walking import is_outside, path_below, regular_state, walk

logger = logging.getLogger(__name__)

INDEX_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLIT_INDEX_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")  # A file train.parquet holds the samples themselves.


@dataclasses.dataclass
class Source:
    """One split of a dataset.

    Attributes:
        identity: where it comes from: resolved folder or hub name, and split.
        licence: the first line of its licence, `""` where unknown.
        media: column with the file of a row.
        columns: names of all columns.
        rows: a sequence of dicts, the media column being `{"path": str | None, "bytes": bytes | None}`, and "row" with
            a name where the row has one, or None where it has no file.
        root: folder that names are relative to; None for hub datasets.
        labels: names of the classes in columns that hold class numbers.
        left_out: files of the folder that no sample is made of, by reason.
        has_named_rows: whether rows are known by their numbers, whatever files they have.
        splits: names of all splits of the dataset.
    """

    identity: str
    licence: str
    media: str
    columns: list[str]
    rows: Any
    root: Path | None = None
    labels: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    has_named_rows: bool = False
    splits: Sequence[str] = ()

    @property
    def is_stream(self) -> bool:
        """Whether rows are read one by one, their number not being known."""
        return isinstance(self.rows, RowStream)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, row). Rows of the same file have the same name, unless rows have names of their own; names do
        not depend on the machine."""
        for index, row in enumerate(self.rows, start=self.rows.n_rows if self.is_stream else 0):
            # Relative to the root, else the path within an archive, else the row's number.
            media = {} if self.has_named_rows and not self.root else row[self.media] or {}
            path = media.get("row") or media.get("path")
            if path and self.root:
                relative = path_below(path, self.root)
                name = relative.encode("utf-8", "backslashreplace").decode()
            elif path and not os.path.isabs(path) and "://" not in path:
                name = path
            else:
                name = f"{index:08d}"
            named = {column: names[row[column]] for column, names in self.labels.items() if row[column] is not None}
            yield name, {**row, **named}


def open_source(
    name: str,
    split: str,
    kind: str,
    *,
    suffixes: Collection[str],
    media: str = "",
    config: str = "",
    allow_outside: bool = False,
    is_streaming: bool = False,
) -> Source:
    """Open one split of a hub dataset or of a local folder or index file.

    Args:
        name: hub name, folder, or index file (.csv, .jsonl).
        split: `""` takes the only split there is.
        kind: `"image"` or `"audio"`; name of the column with the files in local layouts.
        suffixes: endings of the files of that kind, with the dot, in lower case.
        media: column with the files of a hub dataset; `""` takes the only one of that kind.
        config: configuration of a hub dataset.
        allow_outside: whether metadata may name files outside of the folder.
        is_streaming: whether rows that the `datasets` package reads are neither downloaded nor listed.
    Raises:
        FileNotFoundError: nothing is there, or it holds no files of that kind.
        ValueError: the split or the column does not exist, or an index cannot be read; the message lists what exists.
    """
    path = Path(os.path.normpath(Path(name).expanduser()))
    # A layout of ours; other folders may still be what the datasets package knows.
    if path.exists():
        regular_state(path)
        splits = find_splits(path, suffixes, kind)
        if splits and is_streaming:
            raise ValueError(
                f"--streaming has no effect on {name}, whose files are listed and read one by one anyway; leave it out"
            )
        if splits:
            return open_local(path, splits, split, kind=kind, suffixes=suffixes, allow_outside=allow_outside)
        if path.is_file() and (kind, path.suffix.lower()) not in FILE_BUILDERS:
            endings = " ".join((*SPLIT_INDEX_SUFFIXES, *(ending for media, ending in FILE_BUILDERS if media == kind)))
            raise FileNotFoundError(f"{name} is no table or archive of {kind} files ({endings}); give its folder")
    elif not is_hub_name(name) or path.suffix.lower() in INDEX_SUFFIXES:
        raise FileNotFoundError(describe_missing(name))
    return open_with_datasets(name, split, kind, media=media, config=config, is_streaming=is_streaming)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of those of the hub, `user/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def describe_missing(name: str) -> str:
    """That a file or folder does not exist: where it was looked for, and what names of the hub look like."""
    place = os.path.abspath(Path(name).expanduser())
    hub = "" if "/" in name else ", and a data set of the hub is named user/name"
    return f"{name} does not exist: there is no {place}{hub}"


def find_splits(path: Path, suffixes: Collection[str], kind: str = "") -> dict[str, Path]:
    """Splits of a local layout with the folder or index file of each; empty where the layout is none of ours.

    Args: kind: of the files that tables must name to count as an index; `""` for tables that hold the samples.

    Raises: ValueError: there are files of that kind next to the splits' folders.
    """
    if path.is_file():
        return {"train": path} if suffix_of(path) in SPLIT_INDEX_SUFFIXES else {}
    # Children named like a split, and other folders that hold files of the kind.
    splits, others = {}, []
    for child in sorted(path.iterdir()):
        is_index = child.suffix.lower() in SPLIT_INDEX_SUFFIXES and child.is_file()
        split = split_of_name(child.stem) if is_index else SPLIT_NAMES.get(child.name.lower())
        if split and (child.is_dir() or (is_index and (not kind or lists_files(child, kind)))):
            first = splits.setdefault(split, child)
            if child.is_dir() and first.is_dir() and first != child:
                raise ValueError(f"{first} and {child} are both the split {split!r}; put their files into one of them")
            if first.is_dir() and not child.is_dir():
                splits[split] = child  # Its rows name the files of the folder, and their texts.
        elif child.is_dir() and not child.name.startswith(".") and next(walk(child, suffixes), None):
            others.append(child.name)
    if (
        not splits.get("train")
        and any(root.is_dir() for root in splits.values())
        and (others or has_own(path, suffixes))
    ):
        splits["train"] = path  # The folder of training files holds the others.
    elif any(root.is_dir() for root in splits.values()) and others:
        raise ValueError(
            f"{path} holds folders of splits ({', '.join(splits)}) and others with files ({', '.join(others)}); "
            f"name the split's folder itself, such as {path / 'train'}, or rename class folders called like a split"
        )
    # Held-out folders inside the one of training, and shards of an index; without any the folder is the only split.
    for name, child in held_out_folders(splits["train"]).items() if "train" in splits else ():
        splits.setdefault(name, child)
    splits = splits or {"train": path}
    has_files = any(root.is_file() or next(walk(root, suffixes), None) for root in splits.values())
    return splits if has_files or find_index(path, kind) else {}


def has_own(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether files of the kind lie in a folder itself, not in one inside it."""
    return next(walk(folder, suffixes, enters=lambda below: False), None) is not None


def find_index(folder: Path, kind: str) -> Path | None:
    """The metadata file of a folder, the first in the order of `INDEX_SUFFIXES` that is an index of files."""
    files = {file.name.lower(): file for file in folder.iterdir() if file.is_file()}
    candidates = (files[name] for suffix in INDEX_SUFFIXES if (name := f"metadata{suffix}") in files)
    return next((file for file in candidates if not kind or lists_files(file, kind)), None)


def open_local(
    path: Path,
    splits: dict[str, Path],
    split: str,
    *,
    kind: str,
    suffixes: Collection[str],
    allow_outside: bool = False,
) -> Source:
    """Open one split of a local layout."""
    # A folder whose folders say no split: perhaps the names of its files do.
    groups: dict[str, list[int]] = {}
    left_out = LeftOut()
    if splits == {"train": path}:
        rows, left_out = (
            read_folder(path, kind, suffixes) if path.is_dir() else (read_metadata([path], kind), left_out)
        )
        groups = group_by_column(rows, str(path))
        if not groups and path.is_dir():
            groups = group_by_split([relative_path(row, kind, path) for row in rows], are_media=True)
    split = choose_split(str(path), split, list(groups or splits))
    root = splits.get(split, path)
    shared_index = find_index(path, kind) if path.is_dir() and root != path else None
    # A split's own index decides what belongs to it, whatever the folders of its files are called.
    is_own_index = root.is_file()
    # The rows of the split: from its own index, from that of the folder above, or from the files themselves.
    if groups:
        logger.info("%s: splits by name: %s", path, {name: len(indices) for name, indices in groups.items()})
        rows = [rows[index] for index in groups[split]]
    elif is_own_index and path.is_dir():
        rows = read_metadata(shards_of(root, split), kind)
    elif shared_index:
        rows = [row for row in read_metadata([shared_index], kind) if row[kind]["path"]]
        rows = [row for row in rows if Path(row[kind]["path"]).is_relative_to(root)]
        left_out = survey_folder(root, used=[row[kind]["path"] for row in rows], suffixes=suffixes)
    elif splits != {"train": path}:
        rows, left_out = read_folder(root, kind, suffixes)
    if split == "train" and not groups and not is_own_index:
        rows = without_held_out(rows, kind, root)
    root = root.parent if is_own_index else root
    check_inside(rows, kind, path if path.is_dir() else path.parent, allow_outside=allow_outside)
    if path not in splits.values() and splits.get(split, path).is_dir():
        left_out.update("beside the folders of the splits", (file.name for file in files_beside(path, suffixes)))
    if not rows:
        if shared_index:
            raise ValueError(
                f"{shared_index}: no rows for the split {split!r}; write one for each file, or remove the table to "
                "read the files without"
            )
        raise FileNotFoundError(f"no {kind} files under {root}; known endings: {' '.join(sorted(suffixes))}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    source = Source(f"{path.resolve()}:{split}", read_licence(path), kind, columns, rows, root, left_out=left_out)
    source.splits = list(groups or splits)
    return source


def files_beside(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a folder itself that have one of the endings, or one that is read nowhere; no tables, none hidden."""
    children = [child for child in sorted(folder.iterdir()) if child.is_file() and not child.name.startswith(".")]
    known = (*INDEX_SUFFIXES, ".txt", ".md", ".zip", "")
    return [child for child in children if child.suffix.lower() in suffixes or child.suffix.lower() not in known]


def relative_path(row: dict[str, Any], kind: str, folder: Path) -> str:
    """The path of a row's file below a folder, with slashes; "" for a row without one."""
    path = row[kind]["path"]
    return path_below(path, folder) if path else ""


def shards_of(index: Path, split: str) -> list[Path]:
    """The index files of a split, such as train-00.jsonl and train-01.jsonl."""
    return [file for file in sorted(index.parent.glob(f"*{index.suffix}")) if split_of_name(file.stem) == split]


def without_held_out(rows: list[dict[str, Any]], kind: str, root: Path) -> list[dict[str, Any]]:
    """Training rows without those whose files lie in a folder that is named like another split."""
    paths = [relative_path(row, kind, root) for row in rows]
    training = [row for row, path in zip(rows, paths) if not is_held_out(path)]
    if len(training) < len(rows):
        logger.warning(
            "%d files under %s are kept out of training, their folders are named like another split, such as %s; "
            "rename the folder if that is a class",
            *(len(rows) - len(training), root, next(filter(is_held_out, paths))),
        )
    return training


def read_metadata(indices: Collection[Path], kind: str) -> list[dict[str, Any]]:
    """`read_index` of all, each file marked as one that metadata names, for `check_inside`.

    Raises: ValueError: they have no rows.
    """
    rows = [row for index in indices for row in read_index(index, kind)]
    if not rows:
        names = ", ".join(map(str, indices))
        raise ValueError(f"{names} has no rows; write one for each {kind} file, or remove it to read the files alone")
    for row in rows:
        row[kind]["is_named"] = True
    return rows


def check_inside(rows: list[dict[str, Any]], kind: str, folder: Path, *, allow_outside: bool) -> None:
    """Raises: ValueError: metadata names a file outside of the folder of the dataset, or a link that leads there."""
    for row in rows:
        path, is_named = row[kind]["path"], row[kind].pop("is_named", False)
        if path and is_named and not allow_outside and is_outside(path, folder):
            real = os.path.realpath(path)
            raise ValueError(
                f"metadata in {folder} names {path}{f' (a link to {real})' if real != path else ''}, outside of that "
                "folder; --allow_outside reads it, if you trust who wrote the metadata"
            )


def read_folder(folder: Path, kind: str, suffixes: Collection[str]) -> tuple[list[dict[str, Any]], LeftOut]:
    """Rows of a folder's metadata files, or of its files where there is no metadata; and what is left out."""
    files = list(walk(folder, suffixes))
    # Metadata files by their folder.
    folders = dict.fromkeys(file.parent for file in walk(folder, INDEX_SUFFIXES) if file.stem.lower() == "metadata")
    indices = {parent: index for parent in folders if (index := find_index(parent, kind))}
    if indices:
        rows = read_metadata(indices.values(), kind)
        listed = {row[kind]["path"] for row in rows if row[kind]["path"]}
        unlisted = [file for file in files if os.path.normpath(file) not in listed]
        if unlisted:
            logger.warning(
                "%d files under %s are left out, no metadata names them: %s", len(unlisted), folder, unlisted[0]
            )
        return rows, survey_folder(folder, used={*listed, *indices.values()}, suffixes=suffixes)
    # Without metadata, the name of a file's folder is its class, and texts may lie beside the files.
    files, second = without_second_microphone(files)
    texts, rows = SideTexts(folder, files), []
    for file in files:
        label = {"label": file.parent.name} if file.parent != folder else {}
        rows.append({kind: {"path": os.path.normpath(file), "bytes": None}, **label, **texts.row_of(file)})
    left_out = survey_folder(folder, used={*files, *second, *texts.used}, suffixes=suffixes)
    left_out.update("second microphone of an utterance", (file.relative_to(folder).as_posix() for file in second))
    left_out.update("transcript without a recording", texts.without_file([*files, *second]))
    return rows, left_out


def read_index(index: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of a metadata file; paths are relative to its folder. The path is None where a column of that kind is there
    and the row has nothing in it.

    Raises: ValueError: a line cannot be read, or names no file.
    """
    records, rows, listings = list(read_records(index, kind)), [], {}
    columns = dict.fromkeys(column for record in records for column in record)
    has_all_kinds, may_lack = set(KINDS) <= set(columns), "file_name" not in columns and kind in columns
    for number, row in enumerate(records, start=1):
        column = "file_name" if "file_name" in row else kind
        if not (is_missing(row.get(column)) and may_lack):
            check_file_name(row, column if column in row else "file_name", f"{index}: row {number}")
        value = row.pop(column, None)
        path = None if is_missing(value) else find_file(index.parent, value, listings)
        named = {"row": str(index.parent / f"row-{number:08d}")} if has_all_kinds or path is None else {}
        rows.append({kind: {"path": path, "bytes": None, **named}, **row})
    return rows


def read_licence(folder: Path) -> str:
    """First line of a LICENSE or LICENCE file in the folder, or in its parent where it is the folder of a split."""
    folders = [folder, folder.parent] if folder.name.lower() in SPLIT_NAMES else [folder]
    files = [file for parent in folders if parent.is_dir() for file in sorted(parent.glob("LICEN[CS]E*"))]
    return files[0].read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0] if files else ""


def open_with_datasets(
    name: str, split: str, kind: str, *, media: str, config: str, is_streaming: bool = False
) -> Source:
    """Open a hub dataset, or a folder of parquet files or archives, with the `datasets` package."""
    loaded = load_rows(name, split, kind, media=media, config=config, is_streaming=is_streaming)._asdict()
    return Source(**loaded)


def read_media(media: dict[str, Any] | None) -> io.BytesIO:
    """The bytes of a row's file, from memory, from disk, from within an archive, or from the hub.

    Raises: OSError: the file cannot be read, is a pipe or a device, or the row has none.
    """
    if not has_file(media):
        raise FileNotFoundError("the row has no file")
    assert media is not None
    if media["bytes"] is not None:
        return io.BytesIO(media["bytes"])
    if "://" in media["path"]:
        return io.BytesIO(read_address(media["path"]))
    regular_state(media["path"])
    return io.BytesIO(Path(media["path"]).read_bytes())


def read_address(address: str) -> bytes:
    """The bytes at an address that fsspec knows, such as `hf://...`.

    Raises: OSError: they cannot be read, for whatever reason: a package is missing, or the server refuses.
    """
    try:
        filesystem, inner = fsspec.url_to_fs(address)
        return filesystem.cat_file(inner)
    except Exception as error:  # Each protocol has its own.
        raise OSError(f"{address} is an address and cannot be read: {error}; download the file first") from error


def open_media(media: dict[str, Any] | None) -> BinaryIO:
    """As `read_media`, but a file on disk is opened, and not read into memory."""
    if not has_file(media) or media["bytes"] is not None or "://" in media["path"]:
        return read_media(media)
    regular_state(media["path"])
    return open(media["path"], "rb")


def has_file(media: Mapping[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a row has a file, in memory or by its path."""
    return media is not None and (media.get("bytes") is not None or media.get("path") is not None)
