"""Joining the shards of a cache: the same manifest and the same files as one process would have written.

Neither the raw files nor a model are needed: `merge_shards` links or copies the samples of all shards, looks for
training samples that equal one of the validation split, and writes the manifest.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_loading.cache_writer import Journal, check_output, describe_differences, read_entries
from dataset_loading.files import JOURNAL, MANIFEST, Record, read_manifest, remove_leftovers, replacing
from dataset_loading.integrity import changed_bytes
from dataset_loading.left_out import LeftOut
from dataset_loading.locks import LOCK, only_writer
from dataset_loading.pack import pack_in_place, unpack_in_place
from utils.checkpoints import CARD, mark_complete
from utils.preprocessing.arguments import MergeArguments
from utils.preprocessing.finishing import finish_folder, report_totals
from utils.preprocessing.report import unreadable
from utils.preprocessing.rows import once_per_row
from utils.preprocessing.samples import Outcome, describe_problems
from utils.preprocessing.shards import Shard

logger = logging.getLogger(__name__)

# Flags that no setting of the fingerprint covers, but that say which samples there are.
COMPARED_FLAGS = (
    "validation_fraction",
    "limit",
    "num_augmented_copies",
    "keep_duplicates",
    "max_broken_fraction",
    "batch_size",
)


def merge_shards(stage: str, args: MergeArguments) -> dict[str, Any]:
    """Join the shards of a cache in `--output_dir`; a second call after a kill finishes.

    Args: stage: of the preprocessing.
    Returns: the manifest.
    Raises:
        FileNotFoundError: a folder is missing or not complete, or a shard is missing.
        ValueError: shards of other settings or of another listing of raw files, one that is given twice, damaged
            samples, or what `Preprocess.run` raises for the whole.
        OSError: a file cannot be written, or another process writes into the folder.
    """
    shards = order_shards([(Path(folder), read_manifest(Path(folder), stage)) for folder in args.merge])
    output = Path(args.output_dir or f"cached_datasets/{stage}")
    if output.resolve() in [folder.resolve() for folder, _ in shards]:
        raise ValueError(f"--output_dir {output} is one of the shards; choose another folder")
    check_output(output)
    with only_writer(output, "wait until it has ended, or choose another --output_dir"):
        manifest = write_whole(output, shards, given=args.output_dir)
        if args.pack:
            pack_in_place(output, args.pack)
        return manifest


def order_shards(shards: list[tuple[Path, Record]]) -> list[tuple[Path, Record]]:
    """The folders with their manifests in the order of the shards.

    Raises: FileNotFoundError, ValueError: see `merge_shards`.
    """
    by_index: dict[int, tuple[Path, Record]] = {}
    first_folder, first = shards[0]
    for folder, manifest in shards:
        if "shard" not in manifest:
            raise ValueError(f"{folder} is no shard, but a whole cache; --merge takes folders made with --shard i/n")
        # Made with the same settings and of the same listing.
        shard, shard_of_first = manifest["shard"], first["shard"]
        pairs = describe_differences(first, manifest) if shard["settings"] != shard_of_first["settings"] else []
        for name in COMPARED_FLAGS:
            values = [manifest_of["arguments"].get(name) for manifest_of in (first, manifest)]
            pairs += [f"{name}={values[0]!r} there, {values[1]!r} here"] if values[0] != values[1] else []
        if pairs:
            raise ValueError(
                f"{folder} was made with other settings than {first_folder}: {'; '.join(pairs)}. Make both with the "
                "same flags"
            )
        if shard["count"] != shard_of_first["count"]:
            raise ValueError(
                f"{folder} is one of {shard['count']} shards, {first_folder} one of {shard_of_first['count']}; make "
                "all with the same n of --shard i/n"
            )
        # Shards of files know their own raw samples alone.
        compared = ("listing",) if "is_of_files" in shard else ("total", "listing")
        if any(shard[name] != shard_of_first[name] for name in compared):
            raise ValueError(
                f"{folder} was made of other raw files than {first_folder} ({shard['total']} and "
                f"{shard_of_first['total']} samples, whose names, sizes or texts differ); run the commands of the "
                "shards again over the same files"
            )
        if shard["index"] in by_index:
            raise ValueError(
                f"{by_index[shard['index']][0]} and {folder} are both shard {shard['index']}/{shard['count']}; leave "
                "one out"
            )
        by_index[shard["index"]] = folder, manifest
    count = first["shard"]["count"]
    missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in by_index]
    if missing:
        raise FileNotFoundError(f"--merge lacks the shards {', '.join(missing)}; make them with --shard {missing[0]}")
    return [by_index[index] for index in sorted(by_index)]


def write_whole(output: Path, shards: list[tuple[Path, Record]], *, given: str) -> dict[str, Any]:
    """Bring the samples of all shards into the folder and write the manifest; the caller holds the lock.

    Args:
        shards: in their order.
        given: the folder as the user named it, for the command in the manifest.
    """
    started, first = time.perf_counter(), shards[0][1]
    header = header_of_whole(first, given)
    # What the sources left out is the same in all shards, unless each has read other files.
    listed = [manifest["shard"] for _, manifest in (shards if "is_of_files" in first["shard"] else shards[:1])]
    listings = [LeftOut.from_dict(listing) for shard in listed for listing in shard["listings"]]
    outcomes = [problem for listing in listings for problem in unreadable(listing)]
    pairs = [pair for _, manifest in shards for pair in outcomes_of(manifest)]
    outcomes += once_per_row(sorted((outcome for outcome, _ in pairs), key=lambda outcome: outcome.number))
    # By the identity of an outcome's first entry.
    lost_texts = {id(outcome.entries[0]): lost_text for outcome, lost_text in pairs if outcome.entries}
    total, problems = sum(shard["total"] for shard in listed), [outcome for outcome in outcomes if outcome.broken]
    check_broken(problems, total, first["arguments"]["max_broken_fraction"])
    unpack_in_place(output, header)
    earlier = read_entries(output, header)

    # Samples, then what else a shard holds, such as an aligner: its fingerprint is one of the settings.
    n_samples = 0
    with Journal(output, header):
        for folder, manifest in shards:
            for split, entries in manifest["entries"].items():
                for entry in entries:
                    bring_sample(folder / split / f"{entry['key']}.pt", output / split, entry)
                    n_samples += 1
        bring_others(*shards[0], output)
    manifest = finish_folder(
        output,
        header,
        outcomes,
        shard=Shard(),
        total=total,
        keep_duplicates=first["arguments"]["keep_duplicates"],
        has_texts=first["shard"]["has_texts"],
        listings=listings,
        lost_text=lambda entry: lost_texts[id(entry)],
        earlier=earlier,
    )
    report_totals(output, manifest, n_written=n_samples, started=started)
    return manifest


def header_of_whole(manifest: Record, output_dir: str) -> dict[str, Any]:
    """The head of the manifest that one process would write, from that of a shard."""
    names = ("schema", "stage", "fingerprint", "settings", "licence", "arguments", "command", "packages")
    header = {name: manifest[name] for name in names} | {"fingerprint": manifest["settings_fingerprint"]}
    words = list(header["command"])
    if header["arguments"]["output_dir"] != output_dir:
        place = words.index("--output_dir") if "--output_dir" in words else len(words)
        words[place : place + 2] = ["--output_dir", output_dir] if output_dir else []
    return {**header, "arguments": {**header["arguments"], "output_dir": output_dir}, "command": words}


def outcomes_of(manifest: Record) -> Iterator[tuple[Outcome, str]]:
    """The outcomes of a shard, each with what is lost of its text."""
    entries = {split: iter(rows) for split, rows in manifest["entries"].items()}
    for row in manifest["shard"]["outcomes"]:
        fields = {name: value for name, value in row.items() if name not in ("entries", "lost_text")}
        own = [next(entries[row["split"]]) for _ in range(row["entries"])]
        yield Outcome(**fields, entries=own), row["lost_text"]


def bring_sample(file: Path, folder: Path, entry: dict[str, Any]) -> None:
    """Link a sample's file into the whole, or copy it from another file system.

    Raises: ValueError: it is not what was written.
    """
    problem = "it is missing" if not file.exists() else changed_bytes(file, entry)
    if problem:
        raise ValueError(f"{file} is damaged ({problem}); run the command of this shard again")
    with replacing(folder / file.name) as temporary:
        try:
            os.link(file, temporary)
        except OSError as error:
            if error.errno not in (
                errno.EXDEV,
                errno.EPERM,
                errno.EOPNOTSUPP,
                errno.ENOTSUP,
                errno.EINVAL,
                errno.EMLINK,
            ):
                raise
            shutil.copyfile(file, temporary)


def bring_others(shard: Path, manifest: Record, folder: Path) -> None:
    """Copy what a shard holds beside its samples, such as a VAE, whose card names the folder."""
    record = manifest["shard"]
    made_in = Path(manifest["arguments"]["output_dir"] or f"cached_datasets/{manifest['stage']}")
    former = Shard(record["index"], record["count"]).folder_of(made_in)
    for path in sorted(shard.iterdir()):
        if path.name.startswith(".") or path.name in (MANIFEST, JOURNAL, LOCK, "train", "validation"):
            continue
        target = folder / path.name
        remove_leftovers(target)
        if path.is_file():
            with replacing(target, sync=True) as temporary:
                shutil.copyfile(path, temporary)
            continue
        shutil.rmtree(target, ignore_errors=True)
        with replacing(target) as temporary:
            shutil.copytree(path, temporary)
            for card in temporary.rglob(CARD):
                text = card.read_text(encoding="utf-8")
                card.write_text(text.replace(str(former / path.name), str(target)), encoding="utf-8")
                mark_complete(card.parent)


def check_broken(problems: list[Outcome], total: int, max_fraction: float) -> None:
    """Raises: ValueError: more raw files are broken than allowed."""
    if len(problems) > max_fraction * total:
        raise ValueError(
            f"{len(problems)} of {total} raw files are broken, more than --max_broken_fraction="
            f"{max_fraction}: {describe_problems(problems)}. Repair or remove them, or allow more"
        )
