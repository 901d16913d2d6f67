"""Tables as rows of dicts: .csv, .tsv, .json, .jsonl and .parquet, plain or compressed (.gz, .zst, .bz2).

The csv and json modules and pyarrow do the reading. What they pass over in silence is an error here that names file,
line and remedy: rows with more or fewer cells than the header, quotes that are not closed, cells with NUL, bytes that
are not UTF-8. Separators (`,` `;` tab `|`), UTF-8 and UTF-16 are found by the beginning of a file. Names of columns
lose blanks around them, well-known ones their capitals, unless they are asked for as they are written; columns without
a name, such as the index that pandas writes, are left out.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

SEPARATED = {".csv": ",", ".tsv": "\t"}  # The usual separator by ending.
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (*SEPARATED, *JSON_SUFFIXES, ".parquet")
SEPARATORS = (",", ";", "\t", "|")
NAMED_SEPARATOR = re.compile(r"\ufeff?sep=.", re.IGNORECASE)  # The first line of a table for Excel.
CELL_BYTES = 1 << 30  # The csv module refuses cells above 128 KiB by default.
SAMPLE_BYTES = 1 << 16  # Beginning of a file that shows its encoding, separator and quotes.
# Names of columns that are known in any case, by what they hold, in order of preference.
FILE_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "file_path", "audio_filepath", "audio_path")
FILE_COLUMNS += ("wav", "wav_path", "image_path", "image_file", "image_name")
CAPTION_COLUMNS = ("text", "text_normalized", "transcription", "transcript", "sentence", "caption", "captions")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
KNOWN_COLUMNS = frozenset((*FILE_COLUMNS, *CAPTION_COLUMNS, *SPEAKER_COLUMNS, "image", "audio", "label", "language"))
TO_UTF8 = "iconv -f WINDOWS-1252 -t UTF-8 (or the encoding that it has)"


class DamagedFileError(ValueError):
    """A table cannot be read from some line on."""


class Row(NamedTuple):
    """A row, or the ValueError why it cannot be read, with the line of the file where it begins (or the number of the
    row in a .parquet file or a JSON array)."""

    line: int
    value: Any


class Dialect(NamedTuple):
    """How the cells of a table are separated; whether quotes have a meaning; whether blanks follow separators."""

    separator: str
    has_quotes: bool
    has_blanks: bool


# ---- Files as text.


def open_zstd(file: Path) -> IO[bytes]:
    """A zstd file, decompressed as it is read."""
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": open_zstd}


def suffix_of(file: Path) -> str:
    """The ending of a file's name in lower case, without that of a compression: `.jsonl` of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in OPENERS else suffixes[-1] if suffixes else ""


def with_compressions(suffixes: Collection[str]) -> tuple[str, ...]:
    """The endings, and those of the same files compressed."""
    return (*suffixes, *(suffix + compression for compression in OPENERS for suffix in suffixes))


def open_bytes(file: Path) -> Any:
    """A file for reading, decompressed where its ending says so. Raises: OSError."""
    return OPENERS.get(file.suffix.lower(), lambda path: open(path, "rb"))(file)


def encoding_of(head: bytes) -> str:
    """UTF-8 or UTF-16, by the byte order mark; without one by the NUL bytes that are half of a Western UTF-16 text."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > 0.35 * len(head) and min(even, odd) == 0:
        return "utf-16-be" if even else "utf-16-le"
    return "utf-8-sig"


def decode_text(content: bytes) -> str:
    """Bytes of a UTF-8 or UTF-16 file as text, without a byte order mark.

    Raises: ValueError: they are neither; names the line and the remedy.
    """
    encoding = encoding_of(content[:SAMPLE_BYTES])
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 ({error}); convert the file with {TO_UTF8}") from error


def read_text(file: Path) -> str:
    """A file of UTF-8 or UTF-16 as text, decompressed. Raises: ValueError: names file, line and remedy; OSError."""
    with open_bytes(file) as opened:
        content = opened.read()
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def open_text(file: Path) -> io.TextIOWrapper:
    """A file as lines of text; bytes that are not of its encoding become lone surrogates. Line endings stay."""
    with open_bytes(file) as opened:
        encoding = encoding_of(opened.read(SAMPLE_BYTES))
    return io.TextIOWrapper(open_bytes(file), encoding=encoding, errors="surrogateescape", newline="")


# ---- Separated cells.


def find_dialect(sample: str, suffix: str, known: Collection[str] = ()) -> Dialect:
    """The dialect of a table by its beginning.

    Args:
        suffix: `.csv` or `.tsv`, whose separator is preferred where nothing else decides.
        known: further names of columns that are sought.
    """
    header = next((line for line in sample.splitlines() if line.strip() and not NAMED_SEPARATOR.fullmatch(line)), "")
    names = {name.lower() for name in (*KNOWN_COLUMNS, *known)}
    ranks = {}
    # The separator with the most known names in the header, then the one with the most cells.
    for separator in sorted(SEPARATORS, key=lambda separator: separator != SEPARATED.get(suffix)):
        cells = [cell.strip().strip('"').lower() for cell in header.split(separator)]
        ranks[separator] = (sum(cell in names for cell in cells), len(cells))
    separator = max(ranks, key=ranks.__getitem__)
    has_blanks = f"{separator} " in header
    # Tables with tabs or bars are often written without quoting, so that a quote is a character like others there.
    has_quotes = separator in ",;" or is_quoted(sample, separator)
    return Dialect(separator, has_quotes, has_blanks)


def is_quoted(sample: str, separator: str) -> bool:
    """Whether quotes have a meaning in the beginning of a table: rows fall apart without, or every cell that begins
    with one is quoted as a whole."""
    whole = sample if len(sample) < SAMPLE_BYTES else sample.rpartition("\n")[0]
    lines = [line for line in whole.splitlines() if line.strip()]
    if len({line.count(separator) for line in lines}) > 1:
        return True
    quoted = [cell for cell in separator.join(lines).split(separator) if cell.lstrip(" ").startswith('"')]
    return all(re.fullmatch(r' *"([^"]|"")*"', cell) for cell in quoted)


def read_cells(file: Path, dialect: Dialect, lines: Iterator[str]) -> Iterator[Row]:
    """Rows of a separated file, the header first, as lists of cells. A row that cannot be read is the last one."""
    csv.field_size_limit(CELL_BYTES)
    quoting = csv.QUOTE_MINIMAL if dialect.has_quotes else csv.QUOTE_NONE
    options: dict[str, Any] = {"delimiter": dialect.separator, "quoting": quoting}
    reader = csv.reader(lines, strict=True, skipinitialspace=dialect.has_blanks, **options)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = 'close the quotes, and write a quote inside of quotes twice (""), or read and save it with pandas'
            yield Row(line, DamagedFileError(f"{file}: line {line} cannot be read ({error}); {remedy}"))
            return
        is_setting = line == 1 and NAMED_SEPARATOR.fullmatch(dialect.separator.join(cells))
        if not is_setting and (len(cells) > 1 or (cells and cells[0].strip())):
            yield Row(line, cells)


def read_separated(file: Path, known: Collection[str]) -> Iterator[Row]:
    """Rows of a .csv or .tsv file as dicts."""
    with open_text(file) as opened:
        sample = opened.read(SAMPLE_BYTES)
    dialect, names = find_dialect(sample, suffix_of(file), known), None
    with open_text(file) as opened:
        for line, cells in read_cells(file, dialect, opened):
            if isinstance(cells, ValueError):
                yield Row(line, cells)
                continue
            if names is None:
                names = column_names(file, cells, known)
                continue
            # Separators at the end of a row add empty cells, which mean nothing.
            while len(cells) > len(names) and not cells[-1].strip():
                cells.pop()
            yield Row(line, check_cells(file, Row(line, cells), names, dialect=dialect))


def column_names(file: Path, header: list[str], known: Collection[str]) -> list[str]:
    """Names of the columns; `""` for those that have none. Raises: ValueError: two have the same one."""
    names = [column_name(cell, known) for cell in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{file}: two columns are named {twice[0]!r}; rename one of them")
    return names


def column_name(name: str, known: Collection[str]) -> str:
    """A column's name without blanks and marks around it; a well-known one in lower case, unless `known` has it."""
    name = name.strip("\ufeff \t\r\n\u00a0")
    return name.lower() if name.lower() in KNOWN_COLUMNS and name not in known else name


def distinct_names(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """`column_name` of each name; one that would become the same as another stays as it is."""
    simple = {name: column_name(name, known) for name in names}
    if len(set(simple.values())) == len(simple):
        return simple
    counts = Counter(simple.values())
    return {name: new if not new or counts[new] == 1 else name for name, new in simple.items()}


def check_cells(file: Path, row: Row, names: list[str], *, dialect: Dialect) -> Any:
    """A list of cells as a dict, or a ValueError where it has more or fewer than the header, or NUL bytes."""
    line, cells = row
    if len(cells) != len(names):
        counts = f"line {line} has {len(cells)} cells, the header {len(names)} ({', '.join(names)})"
        remedy = f"put a cell that contains {dialect.separator!r} into double quotes, or give each column a cell"
        return ValueError(f"{file}: {counts}; {remedy}")
    if any("\0" in cell for cell in cells):
        return ValueError(f"{file}: line {line} has a NUL byte; remove it, such as with tr -d '\\000'")
    return {name: cell for name, cell in zip(names, cells) if name}


# ---- JSON and Parquet.


def read_json(file: Path, known: Collection[str]) -> Iterator[Row]:
    """Objects of a file with one per line, or with one array of them, whatever its ending."""
    with open_text(file) as opened:
        first = opened.read(SAMPLE_BYTES).lstrip()[:1]
    if first == "[":
        yield from read_json_array(file, known)
        return
    form = "one object per line, or an array of objects"
    with open_text(file) as opened:
        for line, text in enumerate(split_lines(opened), start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(line, ValueError(f"{file}: line {line} is not JSON: {error}; expected is {form}"))
                continue
            yield Row(line, as_record(value, f"{file}: line {line}", form, known))


def split_lines(opened: io.TextIOWrapper) -> Iterator[str]:
    """Lines that end with a line feed, as JSON lines do; a carriage return alone is white space."""
    pending = ""
    for line in opened:
        pending += line
        if line.endswith("\n"):
            yield pending
            pending = ""
    yield pending


def read_json_array(file: Path, known: Collection[str]) -> Iterator[Row]:
    """Objects of an array."""
    with open_text(file) as opened:
        text = opened.read()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        yield Row(
            line, ValueError(f"{file}: line {line}: the array is not JSON: {error}; save it again, or repair it")
        )
        return
    for number, value in enumerate(values, start=1):
        yield Row(number, as_record(value, f"{file}: entry {number}", "an object", known))


def as_record(value: Any, place: str, form: str, known: Collection[str]) -> Any:
    """A JSON object with the usual names of columns, or a ValueError for any other value."""
    if isinstance(value, dict):
        names = distinct_names(value, known)
        return {names[key]: cell for key, cell in value.items() if names[key]}
    return ValueError(f"{place} is {json.dumps(value)[:60]}, no object; expected is {form}")


def read_parquet(file: Path, known: Collection[str]) -> Iterator[Row]:
    """Rows of a .parquet file, a few hundred in memory at a time; of its columns those of `known`, if any."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        columns = distinct_names(table.schema_arrow.names, known)
        wanted = [name for name, simple in columns.items() if simple in known or name in known] if known else None
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for row in range(batch.num_rows):
                number += 1
                try:
                    cells = {columns[name]: batch.column(name)[row].as_py() for name in batch.schema.names}
                except UnicodeDecodeError as error:
                    yield Row(number, ValueError(f"{file}: row {number} is not UTF-8: {error}"))
                    continue
                yield Row(number, {name: cell for name, cell in cells.items() if name})


# ---- Any of them.

READERS = {**dict.fromkeys(SEPARATED, read_separated), **dict.fromkeys(JSON_SUFFIXES, read_json)}
READERS[".parquet"] = read_parquet


def iterate_table(file: Path, known: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a table, one after the other, as dicts; ValueErrors stand for those that cannot be read.

    Args:
        known: further names of columns that the separator is found by, and that stay as they are written; the only
            ones that are read of .parquet.
    Raises:
        OSError: the file cannot be read.
        ValueError: two columns have the same name.
    """
    try:
        yield from READERS[suffix_of(file)](file, known)
    except (OSError, EOFError, UnicodeError, *damages()) as error:
        if isinstance(error, OSError) and error.filename:  # It is missing, or may not be read.
            raise
        reason = str(error) or type(error).__name__
        yield Row(0, DamagedFileError(f"{file} is damaged ({reason}); copy it again"))


def damages() -> tuple[type[Exception], ...]:
    """Errors of files that are cut off or overwritten."""
    import zlib

    import pyarrow

    return zlib.error, gzip.BadGzipFile, pyarrow.ArrowException


def read_table(file: Path) -> list[dict[str, Any]]:
    """All rows of a table. Raises: ValueError: the first that cannot be read, with file, line and remedy."""
    rows = []
    for _, value in iterate_table(file):
        if isinstance(value, ValueError):
            raise value
        rows.append(value)
    # Bytes that are not UTF-8 were read as surrogates, to name the line.
    if suffix_of(file) != ".parquet":
        check_utf8(file)
    return rows


def check_utf8(file: Path) -> None:
    """Raises: ValueError: a line is not of the file's encoding."""
    with open_text(file) as opened:
        for line, text in enumerate(opened, start=1):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{file}: line {line} is not UTF-8; convert the file with {TO_UTF8}") from None


def table_columns(file: Path, known: Collection[str] = ()) -> list[str]:
    """The columns of a .csv, .tsv or .parquet file; [] where every row names its own."""
    if suffix_of(file) in SEPARATED:
        with open_text(file) as opened:
            sample = opened.read(SAMPLE_BYTES)
        dialect = find_dialect(sample, suffix_of(file), known)
        with open_text(file) as opened:
            header = next(read_cells(file, dialect, opened), Row(1, []))
        if isinstance(header.value, ValueError):
            raise header.value
        return [name for name in column_names(file, header.value, known) if name]
    if suffix_of(file) == ".parquet":
        from pyarrow import parquet

        return list(distinct_names(parquet.read_schema(file).names, known).values())
    return []


def captions_of(value: Any) -> list[str]:
    """All captions of a cell, of which some datasets have several; [""] where there is none.

    Raises: ValueError: one is an object or a truth value, or has NUL characters.
    """
    values = value if isinstance(value, list | tuple) else [value]
    for item in values:
        if isinstance(item, str) and "\0" in item:
            raise ValueError(f"a caption has a NUL character: {item[:60]!r}; remove it")
        if isinstance(item, dict | list | bool):
            raise ValueError(
                f"a caption is {repr(item)[:60]}, no text; name their column with --caption_column, or "
                "write them as a text or a list of texts"
            )
    # Empty cells of data frames are not a number, which differs from itself.
    captions = [str(value) for value in values if value is not None and value == value]
    return captions or [""]
