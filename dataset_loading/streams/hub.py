"""Rows that the `datasets` package reads: hub data sets, parquet files, archives, folders of `save_to_disk`.

They are opened undecoded, so that a broken file stops nothing; downloaded and listed, or as a stream.
"""

import copy
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dataset_loading.files import fingerprint
from dataset_loading.left_out import survey_folder
from dataset_loading.splits import choose_split
from dataset_loading.streams.rows import RowStream
from dataset_loading.walking import walk

KINDS = ("image", "audio")  # Columns of files; a table with all of them has its rows named by number.
# Readers of the datasets package for single files, by kind of data and ending.
FILE_BUILDERS = {(kind, ".parquet"): "parquet" for kind in KINDS}
FILE_BUILDERS |= {("image", ".zip"): "imagefolder", ("audio", ".zip"): "audiofolder"}


class HubRows(NamedTuple):
    """One split. `rows` is a `datasets.Dataset` or a `HubStream`; the others are fields of a `Source`."""

    rows: Any
    identity: str
    licence: str
    media: str
    columns: list[str]
    labels: dict[str, list[str]]
    has_named_rows: bool
    splits: list[str]


class HubStream(RowStream):
    """Rows of a `datasets.IterableDataset`.

    Args:
        rows: the dataset.
        name: for messages.
        content: identifies its files.
    """

    def __init__(self, rows: Any, name: str, content: str):
        super().__init__()
        self.rows, self.name, self.content, self.reading = rows, name, content, rows

    def read(self, start):
        self.reading = copy.copy(self.rows)
        if start:
            self.reading.load_state_dict(start)
        rows = iter(self.reading)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # Those of pyarrow, of file systems, and of servers.
                raise OSError(
                    f"{self.name}: the row after {self.n_rows} rows cannot be read ({type(error).__name__}: {error}); "
                    "the same command continues from there"
                ) from error
            if row is None:
                return
            yield row

    def state(self):
        return self.reading.state_dict()


def load_splits(name: str, kind: str, config: str, *, is_streaming: bool) -> tuple[dict[str, Any], str]:
    """All splits of a data set, and what identifies its files where they are a stream.

    Raises: FileNotFoundError: there is no such data set, or it cannot be loaded; the message says why.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    content = ""
    try:
        if Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
            if is_streaming:
                splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, datasets.Dataset) else loaded
                content = fingerprint({split: rows._fingerprint for split, rows in splits.items()})
                loaded = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        else:
            file_builder = FILE_BUILDERS.get((kind, Path(name).suffix.lower())) if Path(name).is_file() else None
            options = {"data_files": {"train": name}} if file_builder else {"name": config or None}
            if is_streaming:
                builder = datasets.load_dataset_builder(file_builder or name, **options)
                loaded, content = builder.as_streaming_dataset(), content_of(builder)
            else:
                loaded = datasets.load_dataset(file_builder or name, **options)
    except (OSError, ValueError, zipfile.BadZipFile, DatasetsError) as error:
        place = f"no {kind} files under {name}" if Path(name).exists() else f"{name!r} is no local folder"
        reason = describe_unreadable(Path(name)) or str(error.__cause__ or error).partition("\n")[0]
        raise FileNotFoundError(f"{place}, and the datasets package cannot load it: {reason}") from error
    splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return {str(split): rows for split, rows in splits.items()}, content


def content_of(builder: Any) -> str:
    """What identifies the files of a data set: their names (with the revision on the hub), times and versions."""
    files = {
        str(split): [list(map(str, files)), [list(map(str, row)) for row in getattr(files, "origin_metadata", ())]]
        for split, files in (builder.config.data_files or {}).items()
    }
    return fingerprint([builder.name, builder.hash, version("datasets"), files])


def load_rows(name: str, split: str, kind: str, *, media: str, config: str, is_streaming: bool = False) -> HubRows:
    """One split of a data set, whose media column is `{"path": ..., "bytes": ...}`.

    Args: as of `dataset_loading.sources.open_source`.
    Raises: FileNotFoundError, ValueError: it cannot be loaded, or has not that split or column.
    """
    import datasets

    features = {"image": datasets.Image, "audio": datasets.Audio}
    if kind not in features:
        raise ValueError(
            f"{name!r} is no local folder of {kind} files, and hub data sets are read for {' and '.join(features)} "
            f"alone: media={kind!r} of the stage needs a folder or an index file"
        )
    feature = features[kind]
    # Load all splits, and choose one.
    splits, content = load_splits(name, kind, config, is_streaming=is_streaming)
    known = list(splits)
    split = choose_split(name, split, known)
    rows = splits[split]
    if is_streaming and rows.features is None:  # Of tables without types: from their beginning.
        rows = rows._resolve_features()
    # The column with the files, by its type; tables of other programs have bytes there, or structs with bytes.
    candidates = [column for column, type_of in rows.features.items() if isinstance(type_of, feature)]
    candidates = candidates or [column for column, type_of in rows.features.items() if has_bytes(type_of)]
    if media and media not in rows.column_names:
        raise ValueError(f"--media_column={media!r} is no column of {name}; there is: {', '.join(rows.column_names)}")
    if not media and len(candidates) != 1:
        counts = f"{len(candidates)} {kind} columns among {', '.join(rows.column_names)}"
        raise ValueError(f"{name} has {counts}; name the one to use with --media_column")
    media = media or candidates[0]
    # Class numbers become names; files stay undecoded, so that a broken one stops nothing.
    types = dict(rows.features).items()
    labels = {column: type_of.names for column, type_of in types if isinstance(type_of, datasets.ClassLabel)}
    # Other files are not read at all.
    kind_of = {column: k for column, type_of in types for k in KINDS if isinstance(type_of, features[k])}
    for column, other in {**kind_of, media: kind}.items():  # Before columns go: a stream decodes them on the way.
        rows = rows.cast_column(column, features[other](decode=False))
    if others := [column for column in kind_of if column != media]:
        rows = rows.remove_columns(others)
    identity = f"{Path(name).resolve() if Path(name).exists() else name}{f'/{config}' if config else ''}:{split}"
    columns, licence = list(rows.column_names), rows.info.license or ""
    rows = HubStream(rows, f"{name}:{split}", fingerprint([content, split])) if is_streaming else rows
    has_named_rows = set(kind_of.values()) == set(KINDS)
    return HubRows(rows, identity, licence, media, columns, labels, has_named_rows, known)


def describe_unreadable(path: Path) -> str:
    """Why a local folder or file holds nothing that can be read: .parquet and .zip files that are damaged, or what is
    there instead; `""` where that says nothing."""
    from pyarrow import ArrowException, parquet

    problems = []
    endings = (".parquet", ".zip")
    for file in walk(path, endings) if path.is_dir() else [path] * (path.suffix.lower() in endings):
        try:
            zipfile.ZipFile(file).close() if file.suffix.lower() == ".zip" else parquet.read_metadata(file)
        except (OSError, zipfile.BadZipFile, ArrowException) as error:
            problems.append(f"{file} is damaged ({error}); copy it again, or remove it")
    return "; ".join(problems[:5]) or (str(survey_folder(path, used=(), suffixes=())) if path.is_dir() else "")


def has_bytes(type_of: Any) -> bool:
    """Whether a column of the `datasets` package holds files as bytes, or as structs with `bytes`."""
    type_of = type_of.get("bytes") if isinstance(type_of, dict) else type_of
    return getattr(type_of, "dtype", "") in ("binary", "large_binary")
