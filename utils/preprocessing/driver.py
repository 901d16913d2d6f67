"""The preprocessing driver: a stage defines how one raw file becomes tensors, `Preprocess` does the rest.

It reads the source, splits off validation samples by a hash of the raw file's name, runs worker processes, writes one
file per sample, continues where an interrupted run stopped, and writes the manifest last. The tensors depend on the
seed, the sample and the copy only, never on the number of workers.
"""

import dataclasses
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Collection, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataset_loading.cache_writer import (
    Journal,
    check_output,
    part_key,
    read_entries,
    save_tensors,
)
from dataset_loading.content import describe_content, is_same_content, stem_of
from dataset_loading.files import SCHEMA, fingerprint
from dataset_loading.integrity import changed_bytes, non_finite
from dataset_loading.locks import only_writer
from dataset_loading.pack import pack_in_place, unpack_in_place
from dataset_loading.sources import Source, has_file
from dataset_loading.streams.opening import open_any
from dataset_loading.tables import captions_of
from utils.command_line import explained_errors, parse_arguments
from utils.console.progress import ProgressReport
from utils.preprocessing.arguments import MergeArguments, PreprocessArguments, arguments_or_merge, command_words
from utils.preprocessing.finishing import finish_folder, report_totals
from utils.preprocessing.launched import run_launched
from utils.preprocessing.merging import check_broken, merge_shards
from utils.preprocessing.report import report_unread_validation, unreadable
from utils.preprocessing.rows import first_rows, merge_rows, once_per_row
from utils.preprocessing.samples import (
    FEW_SAMPLES,
    Example,
    Naming,
    Outcome,
    Prepared,
    Raw,
    SkipSampleError,
    Task,
    is_validation,
    named_cell,
    notes_of,
    renewed,
    smallest_name,
)
from utils.preprocessing.shards import Shard, arguments_of
from utils.preprocessing.streaming import RowLog, beginning
from utils.preprocessing.workers import map_in_workers
from utils.seeds import seed_of

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "pillow", "datasets")


class Preprocess:
    """Preprocessing of one stage. Subclasses state the class attributes, `settings`, `decode` and `encode`."""

    name: ClassVar[str]
    arguments_class: ClassVar[type[PreprocessArguments]] = PreprocessArguments
    media: ClassVar[str]  # "image" or "audio"
    suffixes: ClassVar[Collection[str]]
    # Tried in turn where --caption_column is not given.
    caption_columns: ClassVar[tuple[str, ...]] = ("text", "caption", "captions")
    packages: ClassVar[tuple[str, ...]] = PACKAGES  # Their versions are noted in the manifest.
    encodes_captions: ClassVar[bool] = False  # Whether the tensors depend on the caption.

    def __init__(self, args: Any):
        self.args = args
        self.shard = Shard.parse(args.shard)
        self.folder = self.shard.folder_of(Path(args.output_dir or f"cached_datasets/{self.name}"))

    # ---- What a stage defines.

    def settings(self) -> dict[str, Any]:
        """The arguments that shape the tensors, as JSON values. Two runs may share a folder only if they agree."""
        raise NotImplementedError

    def information(self) -> dict[str, Any]:
        """Settings that the manifest shows but that do not shape the tensors, such as the path of a model."""
        return {}

    def decode(self, media: dict[str, Any] | None) -> Any:
        """Read one raw file; called once for all copies. What it raises is reported and the sample left out."""
        raise NotImplementedError

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of one copy. All randomness comes from the generator."""
        raise NotImplementedError

    def encode_parts(self, example: Example, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """The tensors of all samples that one copy becomes: one here, or parts in their order."""
        return [self.encode(example, generator)]

    def examples(self, source: Source) -> Iterator[tuple[str, Raw]]:
        """Yields (name, raw sample). Samples of the same name never fall on both sides of the validation split."""
        column = self.find_column(source, "caption_column", self.caption_columns)
        for name, row in source:
            with named_cell(source.identity, name, column):
                captions = list(self.captions(row.get(column)))
            for place, (caption, notes) in enumerate(captions):
                yield name, Raw(row[source.media], caption, notes, place)

    def captions(self, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (caption, notes) of the samples that a row becomes: one per caption where captions are encoded, else
        one with the first caption and all of them as a note."""
        captions = captions_of(value)
        if self.encodes_captions:
            yield from ((caption, {}) for caption in captions)
        else:
            yield captions[0], {"captions": captions} if len(captions) > 1 else {}

    def lost_text(self, entry: dict[str, Any]) -> str:
        """What is lost of the text of a sample that was written, in words; `""` for nothing."""
        return ""

    def block_of(self, number: int) -> int:
        """The block of a raw sample; shards have whole blocks."""
        return number

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, int | float]:
        """`length` of a sample, and further sizes to be totalled in the manifest, such as seconds."""
        return {"length": next(iter(tensors.values())).shape[-1]}

    # ---- What all stages share.

    @classmethod
    def main(cls, argv: list[str] | None = None) -> dict[str, Any]:
        """Parse, preprocess, report; returns the manifest."""
        arguments_class = arguments_or_merge(cls.arguments_class, argv)
        args = parse_arguments(arguments_class, argv, sys.modules[cls.__module__].__doc__ or cls.name)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
        for number in (signal.SIGINT, signal.SIGTERM):  # A background shell has its children ignore SIGINT.
            signal.signal(number, interrupt)
        try:
            with explained_errors(logger):
                try:
                    if arguments_class is MergeArguments:
                        return merge_shards(cls.name, args)
                    return run_launched(cls.name, args, lambda args: cls(args).run())
                except AttributeError as error:
                    if error.obj is not args:
                        raise
                    raise ValueError(
                        f"{cls.__name__} reads --{error.name}, which {type(args).__name__} does not declare; its "
                        "arguments_class must name a class that does"
                    ) from error
        except KeyboardInterrupt as stop:
            logger.warning("stopped; the same command continues from here")
            number = stop.args[0] if stop.args else signal.SIGINT
            raise SystemExit(128 + number) from None  # As a shell says of a process that the signal ends.

    def run(self) -> dict[str, Any]:
        """Write the missing samples, then the manifest, which is returned.

        Raises:
            FileNotFoundError: the source is missing or empty.
            ValueError: a folder made with other settings, too many broken files, or no sample at all.
            OSError: a file cannot be written, or another process writes into the folder.
        """
        sources = self.open_sources()
        check_output(self.folder)
        with only_writer(self.folder, "wait until it has ended, or choose another --output_dir"):
            return self.write_folder(sources)

    def write_folder(self, sources: dict[str, Source]) -> dict[str, Any]:
        """Write the missing samples, then the manifest; the caller holds the lock of the folder."""
        # The head of the manifest, and what earlier runs have written, a file per sample.
        started = time.perf_counter()
        header = self.header(sources)
        total = self.total(sources)
        outcomes = [problem for source in sources.values() for problem in unreadable(source.left_out)]
        problems = list(outcomes)
        check_broken(problems, total, self.args.max_broken_fraction)
        unpack_in_place(self.folder, header)
        earlier_entries = read_entries(self.folder, header)
        rows = RowLog.open(self.folder, header, sources, shard=self.shard)

        # Process what is missing. The journal gets every sample as soon as its file is written.
        n_rows = self.shard.n_samples(total) if total != math.inf else None
        with Journal(self.folder, header) as journal, rows, ProgressReport(self.name, n_rows) as report:
            for outcome in once_per_row(rows.noted(self.work(self.plan(sources, earlier_entries, rows)))):
                outcomes.append(outcome)
                if outcome.broken:
                    problems.append(outcome)
                    check_broken(problems, total, self.args.max_broken_fraction)
                # Where nothing new was written, the journal has the entries already.
                journal.add(outcome.split, outcome.entries if outcome.n_written else [])
                if outcome.number == outcome.row:
                    report.advance()
        # What streams counted on the way.
        if streams := [source for source in sources.values() if source.is_stream]:
            total = sum(self.count(source) for source in sources.values())
            lost = [problem for stream in streams for problem in unreadable(stream.left_out)]
            outcomes, problems = [*lost, *outcomes], [*lost, *problems]
            check_broken(problems, total, self.args.max_broken_fraction)

        # The manifest of the whole, or of a shard with what the whole needs.
        manifest = finish_folder(
            self.folder,
            header,
            outcomes,
            shard=self.shard,
            total=total,
            keep_duplicates=self.args.keep_duplicates,
            has_texts=self.encodes_captions,
            listings=[source.left_out for source in sources.values()],
            lost_text=self.lost_text,
            earlier=earlier_entries,
        )
        if self.args.pack:
            pack_in_place(self.folder, self.args.pack)
        n_written = sum(outcome.n_written for outcome in outcomes)
        n_found = sum(len(outcome.entries) for outcome in outcomes) - n_written
        report_totals(self.folder, manifest, n_written=n_written, started=started, n_found=n_found)
        return manifest

    def open_sources(self) -> dict[str, Source]:
        """The training source and, where --validation_dataset names one, the validation source."""
        args = self.args
        options = {"suffixes": self.suffixes, "media": args.media_column, "config": args.dataset_config}
        options |= {"allow_outside": args.allow_outside, "is_streaming": args.streaming}
        sources = {"train": open_any(args.dataset_name, args.dataset_split, self.media, **options)}
        if args.validation_dataset:
            sources["validation"] = open_any(args.validation_dataset, args.validation_split, self.media, **options)
            if sources["validation"].identity == sources["train"].identity:
                raise ValueError(
                    f"training and validation would both read {sources['train'].identity}; see --validation_split"
                )
        else:
            report_unread_validation(sources["train"], args)
        # A caption column that a flag names must exist; the usual ones are optional where captions are only noted.
        for source in sources.values():
            if not self.find_column(source, "caption_column", self.caption_columns):
                names = " or ".join(map(repr, self.caption_columns))
                if self.encodes_captions:
                    columns = ", ".join(source.columns)
                    raise ValueError(
                        f"{source.identity} has no captions: neither a column {names} (there is: {columns}) nor texts "
                        "beside the files; add them, or name their column with --caption_column"
                    )
                logger.info("%s has no column %s: captions are empty", source.identity, names)
        return sources if self.encodes_captions else {split: self.merged(source) for split, source in sources.items()}

    def merged(self, source: Source) -> Source:
        """The source with one row for each file, which has all captions."""
        return merge_rows(source, self.find_column(source, "caption_column", self.caption_columns), ())

    def find_column(self, source: Source, flag: str, usual: tuple[str, ...]) -> str:
        """The column that a flag names, or the first usual one, or `""`.

        Raises: ValueError: the source does not have the column that was asked for.
        """
        column = getattr(self.args, flag)
        for name in filter(None, (column, column.lower())):  # Tables lose the capitals of well-known columns.
            if name in source.columns:
                return name
        # A name other than the default was given by the user.
        if column != getattr(type(self.args), flag):
            columns = ", ".join(source.columns)
            raise ValueError(f"--{flag}={column!r} is no column of {source.identity}; there is: {columns}")
        return next((column for column in usual if column in source.columns), "")

    def header(self, sources: dict[str, Source]) -> dict[str, Any]:
        """The manifest without the samples: settings, fingerprint, command, versions."""
        separate = sources.get("validation")
        validation = separate.identity if separate is not None else f"{self.args.validation_fraction} of the source"
        # Everything that shapes the tensors or the split, and nothing else, is in the fingerprint.
        settings = {
            **self.settings(),
            "seed": self.args.seed,
            "source": sources["train"].identity,
            "validation": validation,
        }
        settings = json.loads(json.dumps(settings))  # As it will be read again: lists instead of tuples.
        identity = {"schema": SCHEMA, "stage": self.name, **settings}
        self.shard.settings = fingerprint({**identity, "source": "", "validation": separate is not None})
        return {
            "schema": SCHEMA,
            "stage": self.name,
            "fingerprint": fingerprint(identity),
            "settings": {**settings, **self.information()},
            "licence": sources["train"].licence,
            "arguments": arguments_of(self.args),
            "command": command_words(f"preprocess_{self.name}_dataset.py", self.args),
            "packages": {name: version(name) for name in self.packages},
        }

    def count(self, source: Source) -> int:
        """Raw samples that are read from a source; of a stream, those that were."""
        if source.is_stream:
            return source.rows.n_own if source.rows.has_shares else source.rows.n_rows
        return len(source) if self.args.limit < 0 else min(len(source), self.args.limit)

    def total(self, sources: dict[str, Source]) -> int | float:
        """Raw samples that are to be read, or the maximum of them where a source is a stream."""
        limit = self.args.limit if self.args.limit >= 0 else math.inf
        return sum(limit if source.is_stream else self.count(source) for source in sources.values())

    def plan(
        self,
        sources: dict[str, Source],
        earlier: dict[tuple[str, str], dict[str, Any]],
        rows: RowLog | None = None,
    ) -> Iterator[Task]:
        """The tasks in the order of the sources; those with nothing missing carry no raw file.

        Args:
            earlier: entries of earlier runs by split and key.
            rows: what earlier runs noted of the rows of streams, which are not read again.
        """
        number, row, rows = -1, 0, rows or RowLog()
        for source_split, source in sources.items():
            naming = self.naming(source_split, source, is_only=len(sources) == 1)
            for note in rows.replay(
                source_split, source, naming, shard=self.shard, find=partial(self.intact_entry, earlier)
            ):
                number = note.number_after(number)
                row = row if note.place else number
                if note.outcome:
                    outcome = dataclasses.replace(note.outcome, number=number, row=row)
                    yield Task(number, outcome.split, outcome.name, Raw(None, ""), {}, [], row, outcome=outcome)
            limit = -1 if source.is_stream else self.args.limit
            for name, raw in first_rows(self.examples(source), limit):
                number = max(number + 1, source.rows.first_number if source.is_stream else 0)
                row = row if raw.place else number
                split, keys = naming.assign(name)
                if source.is_stream and source.rows.has_shares:
                    is_taken = source.rows.is_own
                else:
                    is_taken = self.shard.takes(self.block_of(number), split, name, raw)
                rows.add(source_split, number, name, place=raw.place, is_taken=is_taken)
                if not is_taken:
                    continue
                # Entries of the copies that earlier runs wrote, with the captions of now; the others are missing.
                existing = {copy: self.find_entries(earlier, (split, key), raw) for copy, key in keys.items()}
                entries = [renewed(entry, raw, len(parts)) for parts in existing.values() for entry in parts]
                missing = {copy: key for copy, key in keys.items() if not existing[copy]}
                raw = raw if missing else Raw(None, raw.caption)
                yield Task(number, split, name, raw, missing, entries, row)

    def naming(self, source_split: str, source: Source, *, is_only: bool) -> Naming:
        """The splits and keys of the raw samples of a source.

        Args: is_only: whether validation samples are held out of it.
        """
        fraction = self.args.validation_fraction if is_only else 0.0
        return Naming(
            source_split, fraction, self.only_held_out(source) if is_only else "", self.args.num_augmented_copies
        )

    def only_held_out(self, source: Source) -> str:
        """The name to hold out of a small source none of whose names falls into the validation share: the one with
        the smallest hash; `""` where it is not needed, or nothing would be left."""
        fraction = self.args.validation_fraction
        if not fraction or (not source.is_stream and self.count(source) > FEW_SAMPLES):
            return ""
        names = {}  # The first of each stem, as in `Naming`.
        source = beginning(source, FEW_SAMPLES + 1)
        for name, _ in first_rows(self.examples(source), self.args.limit):
            first = names.setdefault(stem_of(name), name)
            if is_validation(first, fraction):
                return ""
        is_large = source.is_stream and source.rows.n_rows > FEW_SAMPLES
        return "" if is_large or len(names) < 2 else smallest_name(names.values())

    def intact_entry(
        self, earlier: dict[tuple[str, str], dict[str, Any]], split: str, key: str
    ) -> dict[str, Any] | None:
        """The entry of a sample that an earlier run wrote and whose file is intact; None for others."""
        entry = earlier.get((split, key))
        return entry if entry and self.is_intact(entry, split) else None

    def find_entries(
        self, earlier: dict[tuple[str, str], dict[str, Any]], name: tuple[str, str], raw: Raw
    ) -> list[dict[str, Any]]:
        """The entries of all parts of a copy that an earlier run wrote; none where one is missing.

        Args:
            earlier: entries of earlier runs by split and key.
            name: split and key of the copy.
        """
        split, key = name
        # The first part has the key of the copy itself, and its entry tells the number of parts.
        n_parts = earlier.get(name, {}).get("parts", 1)
        entries = [earlier.get((split, part_key(key, part))) for part in range(n_parts)]
        is_whole = all(self.is_valid(entry, split, raw) for entry in entries)
        return [entry for entry in entries if entry] if is_whole else []

    def is_valid(self, entry: dict[str, Any] | None, split: str, raw: Raw) -> bool:
        """Whether an earlier run wrote a sample, its file is what was written, the raw file has the same content, and
        caption and language, if encoded, have not changed."""
        if entry is None or not is_same_content(entry, raw.media):
            return False
        if any(entry.get(name) != raw.notes.get(name) for name in ("offset", "duration")):
            return False
        languages = entry.get("language", ""), raw.notes.get("language", "")
        if self.encodes_captions and (entry["caption"] != raw.caption or languages[0] != languages[1]):
            return False
        return self.is_intact(entry, split)

    def is_intact(self, entry: dict[str, Any], split: str) -> bool:
        """Whether the file of a sample is there, and is what was written."""
        file = self.path(split, entry["key"])
        if not file.exists():
            return False
        problem = changed_bytes(file, entry)
        if problem:
            logger.warning("%s is damaged (%s) and is written again", file, problem)
        return not problem

    def path(self, split: str, key: str) -> Path:
        """The file of a sample."""
        return self.folder / split / f"{key}.pt"

    def prepare(self, task: Task) -> Prepared:
        """Decode one raw file and encode its missing copies; a file that cannot be is an outcome without entries."""
        if task.outcome:
            return Prepared(task.outcome, [])
        has_text = bool(task.raw.caption.strip())
        outcome = Outcome(task.number, task.split, task.name, list(task.entries), has_text=has_text, row=task.row)
        if not task.missing:  # Earlier runs wrote all copies.
            return Prepared(outcome, [])
        examples = []
        try:
            if not has_file(task.raw.media):
                raise SkipSampleError(f"the row has no {self.media}")
            if problem := (task.raw.media or {}).get("problem"):
                raise ValueError(problem)
            outcome.content = describe_content(task.raw.media)
            data = self.decode(task.raw.media)
            for copy, key in task.missing.items():
                # Seeded by the key, so that a copy does not depend on what was processed before it.
                generator = torch.Generator().manual_seed(seed_of(self.args.seed, key))
                example = Example(task.name, copy, data, task.raw.caption, key, notes=task.raw.notes)
                parts = self.encode_parts(example, generator)
                for part, data_of_part in enumerate(parts):
                    changes = {"key": part_key(key, part), "part": part, "n_parts": len(parts)}
                    examples.append(dataclasses.replace(example, data=data_of_part, **changes))
        except SkipSampleError as reason:
            return Prepared(dataclasses.replace(outcome, entries=[], skipped=str(reason)), [])
        except Exception as error:  # Anything may be wrong with a raw file; the manifest reports it.
            return Prepared(dataclasses.replace(outcome, entries=[], broken=f"{type(error).__name__}: {error}"), [])
        return Prepared(outcome, examples)

    def write(self, outcome: Outcome, examples: list[Example]) -> Outcome:
        """Write the encoded copies of one raw file, none where one holds values that are not finite: it counts as
        broken. Raises: OSError: a file cannot be written."""
        problems = [problem for example in examples if (problem := non_finite(example.data))]
        if problems:
            return dataclasses.replace(outcome, entries=[], broken=f"ValueError: {problems[0]}")
        entries = list(outcome.entries)
        for example in examples:
            # File first, then the entry: an interrupted run may have files without entries, never the reverse.
            digest = save_tensors(self.path(outcome.split, example.key), example.data)
            entry = {"key": example.key, "source": example.name, "copy": example.copy, **digest, **outcome.content}
            entry |= {**notes_of(example, example.n_parts), **self.measure(example.data)}
            entries.append(entry | ({"part": example.part, "parts": example.n_parts} if example.n_parts > 1 else {}))
        # Copies and their parts in order, whichever run wrote them.
        entries.sort(key=lambda entry: (entry["copy"], entry.get("part", 0)))
        return dataclasses.replace(outcome, entries=entries, n_written=len(examples))

    def process(self, task: Task) -> Outcome:
        """Prepare and write one raw file. Raises: OSError: a file cannot be written."""
        prepared = self.prepare(task)
        return self.write(prepared.outcome, prepared.examples)

    def work(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        """Process tasks in this process or in several; outcomes come in any order.

        Raises: ChildProcessError: a worker died.
        """
        return map_in_workers(self.process, tasks, self.args.num_workers)


def interrupt(number: int, _: Any) -> None:
    """Signal handler. Raises: KeyboardInterrupt: with the number of the signal."""
    raise KeyboardInterrupt(number)
