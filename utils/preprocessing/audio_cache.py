"""An audio cache as the source of audio latents: its rows, the tokenizer of its transcripts, its speakers."""

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dataset_loading.audio.cached import AudioDataset
from dataset_loading.cache_writer import read_journal
from dataset_loading.content import digest_of_sample
from dataset_loading.files import JOURNAL, read_manifest
from dataset_loading.sources import Source
from model.text.espeak import check_language
from model.text.phonemes import SpeechTokenizer

SENTENCE_SECONDS = (2, 15)  # Length of clips that speech is learnt from best, see docs/training.md.


def as_source(dataset: AudioDataset) -> Source:
    """A split of an audio cache, with rows of `name`, `audio` (arguments of `read_sample`), `text` (a list where a
    clip has several), `speaker`, `language` ("" where it is not known) and `copy`."""
    repair = dataset.repair()
    rows = [
        {
            "name": entry["source"],
            "audio": {
                "path": dataset.file_of(index),
                **({"index": dataset.places[index]} if dataset.packs else {}),
                "entry": entry,
                "kinds": dataset.tensor_kinds(entry),
                "repair": repair,
                **digest_of_sample(entry),
            },
            "text": entry.get("captions", entry["caption"]),
            "speaker": entry["speaker"],
            "language": entry.get("language", ""),
            "copy": entry["copy"],
        }
        for index, entry in enumerate(dataset.entries)
    ]
    # Not its path: a cache that was moved is the same. Not its content: each sample is compared.
    identity = f"audio cache {dataset.settings_fingerprint}:{dataset.split}"
    return Source(
        identity, dataset.manifest.get("licence", ""), "audio", ["name", "audio", "text", "speaker", "language"], rows
    )


def check_split(args: Any, validation: AudioDataset) -> None:
    """Raises: ValueError: `--validation_fraction` is given, though the audio cache has a validation split."""
    if "validation_fraction" in getattr(args, "given", ()):
        cache = validation.folder
        changes = {"validation_fraction": args.validation_fraction, "output_dir": f"{cache}_split"}
        raise ValueError(
            f"--validation_fraction={args.validation_fraction} has no effect with --audio_cache {cache}, whose "
            f"validation split of {len(validation)} clips is kept; leave it out, or split the clips anew with: "
            f"{validation.command(validation_dataset=None, validation_split=None, **changes)}"
        )


def earlier_settings(folder: Path) -> dict[str, Any]:
    """The settings with which earlier runs made a folder, finished or not; {} where there were none."""
    if (folder / JOURNAL).is_file():
        headers = (line for line in read_journal(folder / JOURNAL) if isinstance(line, dict))
        return next(headers, {}).get("settings", {})
    return read_manifest(folder, None)["settings"] if (folder / "manifest.json").is_file() else {}


def fit_tokenizer(args: Any, rows: Sequence[dict[str, Any]]) -> SpeechTokenizer:
    """The tokenizer of training texts.

    Args:
        args: flags of `AudioLatentsArguments`.
        rows: as in `as_source`.
    Raises: ValueError: a language that eSpeak NG does not know.
    """
    languages = sorted({row["language"] or args.language for row in rows})
    several = args.units == "phonemes" and (len(languages) > 1 or languages != [args.language])
    for row in rows if several else ():
        if row["language"]:
            try:
                check_language(row["language"])
            except ValueError as error:
                raise ValueError(f"{row['name']}: {error}; see --language_column") from error
    fields: dict[str, Any] = {"units": args.units, "gaps": args.gaps, "language": args.language}
    if several:
        # Texts of no named language are those of --language if clips have it, else of the usual one.
        counts = Counter(row["language"] or args.language for row in rows)
        fields["language"] = args.language if args.language in counts else counts.most_common(1)[0][0]
        fields["languages"] = tuple(languages)
    text_languages = [row["language"] if several else "" for row in rows]
    return SpeechTokenizer.fit((row["text"] for row in rows), text_languages, **fields)


def describe_speakers(entries: Sequence[dict[str, Any]], own: Collection[str]) -> list[str]:
    """For each of several speakers their clips, minutes, aligner, and how well transcripts fit.

    Args: own: speakers with an aligner of their own.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["speaker"], []).append(entry)
    lines = ["clips, minutes, aligner and log-likelihood ratio per frame of each speaker:"]
    for speaker, rows in sorted(groups.items()):
        ratio = statistics.mean(row["likelihood_ratio"] for row in rows)
        kind, minutes = "own" if speaker in own else "shared", sum(row["seconds"] for row in rows) / 60
        lines.append(f"  {speaker or '(unknown)'}: {len(rows)}, {minutes:.1f}, {kind}, {ratio:.2f}")
    return lines if len(groups) > 1 else []


def describe_lengths(entries: Sequence[dict[str, Any]]) -> str:
    """How many clips of speech are no sentences by their length, and what to do; "" where all are."""
    shortest, longest = SENTENCE_SECONDS
    seconds = {entry["source"]: entry["seconds"] for entry in entries}.values()  # Once, also of several copies.
    short, long = [x for x in seconds if x < shortest], [x for x in seconds if x > longest]
    if not short and not long:
        return ""
    found = [f"{len(short)} shorter than {shortest} s (the shortest {min(short):.1f} s)"] if short else []
    found += [f"{len(long)} longer than {longest} s (the longest {max(long):.1f} s)"] if long else []
    joined = "join short ones" if short else ""
    cut = "cut long ones between sentences" if long else ""
    return (
        f"of {len(seconds)} clips, {' and '.join(found)}: speech is learnt best from whole sentences of {shortest} to "
        f"{longest} s; {' and '.join(filter(None, [joined, cut]))} with their transcripts, and preprocess again"
    )
