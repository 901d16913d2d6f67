r"""Turn a cache with a file per sample into a packed one, or back, bit for bit and with the same fingerprint.

    python -m dataset_loading.pack cached_datasets/image_vae cached_datasets/image_vae_packed --pack 1000
    python -m dataset_loading.pack cached_datasets/image_vae_packed cached_datasets/image_vae

What SRC holds decides the direction. `--pack N` of the preprocessing scripts packs the cache that they make.
"""

import argparse
import logging
import shutil
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dataset_loading.cache_writer import check_no_fewer, check_output, check_same, save_tensors, write_manifest
from dataset_loading.cached import read_sample
from dataset_loading.columns import write_columns
from dataset_loading.files import JOURNAL, MANIFEST, Record, digest_file, read_manifest, replace_file, replacing
from dataset_loading.locks import LOCK, only_writer
from dataset_loading.packs import CRC, PACKS, Packs, entries_of, is_packed, open_columns, pack_name

logger = logging.getLogger(__name__)

SAMPLES_PER_PACK = 1000
DUPLICATES = "duplicates"  # Samples that are kept, but not trained on; they lie in the folder of training.
DISTINCT = ("speaker", "language")  # Fields whose different values the manifest lists.


def convert(source: Path, target: Path, samples_per_pack: int | None) -> dict[str, Any]:
    """Pack a cache, or unpack a packed one.

    Args: samples_per_pack: of a cache to pack; None: 1000.
    Returns: the manifest of the target.
    Raises:
        FileNotFoundError: the source is no complete cache.
        ValueError: a sample is damaged, the target holds something else, or a flag has no effect.
        OSError: a file cannot be written, or another process writes into the target.
    """
    manifest = read_manifest(source, None)
    if source.resolve() == target.resolve():
        raise ValueError(f"{source} and {target} are the same folder; name another one")
    if is_packed(manifest) and samples_per_pack is not None:
        raise ValueError(f"--pack={samples_per_pack} has no effect: {source} is packed and will be unpacked")
    if "shard" in manifest:
        raise ValueError(f"{source} is a shard; join the shards first, and give that command --pack")
    check_output(target)
    if (target / MANIFEST).exists():
        raise ValueError(f"{target} holds a cache already; choose another folder, or delete it first")
    with only_writer(target, "wait until it has ended, or choose another folder"):
        (target / JOURNAL).touch()  # Not complete until the manifest is there.
        copy_others(source, target)
        if is_packed(manifest):
            return unpack(source, target, manifest)
        return pack(source, target, manifest, samples_per_pack or SAMPLES_PER_PACK)


def pack(source: Path, target: Path, manifest: Record, samples_per_pack: int) -> dict[str, Any]:
    """Write the packs of a cache and their manifest; the caller holds the lock of the target.

    Args: target: may be the source, whose files per sample are then deleted at the end.
    Returns: the manifest of the target.
    """
    splits = {**entries_of(source, manifest, ""), DUPLICATES: manifest.get(DUPLICATES, [])}
    tables = {}
    for split, entries in splits.items():
        if entries or split != DUPLICATES:
            paths = folder_of(source, split)
            tables[split] = write_packs(target, split, entries, paths, samples_per_pack)
    table = {"samples_per_pack": samples_per_pack, "splits": tables}
    result = write_manifest(target, with_field(manifest, "entries", PACKS, table))
    for split in ("train", "validation"):
        for file in (target / split).glob("*.pt"):
            file.unlink()
    return result


def with_field(manifest: Record, name: str, new_name: str, value: Any) -> dict[str, Any]:
    """A manifest to be written, in which a field has another name and value at the same place."""
    fields = {}
    for key in manifest:
        if key == name:
            fields[new_name] = value
        elif key != "sha256":
            fields[key] = manifest[key]
    return fields


def folder_of(folder: Path, split: str) -> Path:
    """The folder with the files of a split's samples."""
    return folder / ("train" if split == DUPLICATES else split)


def write_packs(
    target: Path, split: str, entries: Sequence[Any], folder: Path, samples_per_pack: int
) -> dict[str, Any]:
    """Write the packs and the index of one split.

    Args: folder: of the files per sample.
    Returns: what the manifest says of the split.
    """
    writer = PackWriter(target / split, samples_per_pack)
    for entry in entries:
        file = folder / f"{entry['key']}.pt"
        writer.add(read_sample(file, entry, kinds={}, repair="the command that made the cache"), file)
    return writer.close(target / f"{split}.arrow", entries)


class PackWriter:
    """Writes samples into packs, in their order.

    Args:
        folder: of the packs of one split; it is made.
        samples_per_pack: samples of a pack; the last one may have fewer.
    """

    def __init__(self, folder: Path, samples_per_pack: int):
        self.folder, self.samples_per_pack = folder, samples_per_pack
        folder.mkdir(parents=True, exist_ok=True)
        self.waiting: list[dict[str, Tensor]] = []
        self.sizes: list[int] = []
        self.crcs, self.n_samples = array("I"), 0
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, list[int | None]] = {}  # None: a size that differs
        self.offsets: dict[str, array] = {}
        self.axes: dict[str, list[array]] = {}

    def add(self, sample: dict[str, Tensor], name: Any) -> None:
        """Append a sample.

        Args: name: of the sample, for messages.
        Raises: ValueError: a tensor has another dtype or number of axes than in earlier samples, or tensors come in
            another order.
        """
        for key, tensor in sample.items():
            if key not in self.dtypes:
                self.dtypes[key], self.shapes[key] = tensor.dtype, list(tensor.shape)
                # Earlier samples have none; the waiting ones get their offsets with the pack.
                self.offsets[key] = array("q", [-1]) * (self.n_samples - len(self.waiting))
                self.axes[key] = [array("i", [0]) * self.n_samples for _ in tensor.shape]
            shape = self.shapes[key]
            if tensor.dtype != self.dtypes[key] or tensor.ndim != len(shape):
                raise ValueError(
                    f"{name} cannot be packed: {key!r} is {tensor.dtype} with {tensor.ndim} axes, in earlier samples "
                    f"{self.dtypes[key]} with {len(shape)}; leave the cache as it is"
                )
            self.shapes[key] = [size if size == n else None for size, n in zip(shape, tensor.shape)]
        if list(sample) != [key for key in self.dtypes if key in sample]:
            raise ValueError(f"{name} cannot be packed: its tensors {list(sample)} come in another order than before")
        crc = 0
        for key in self.dtypes:
            if key in sample:
                crc = zlib.crc32(bytes_of(sample[key]), crc)
            for axis, sizes in enumerate(self.axes[key]):
                sizes.append(sample[key].shape[axis] if key in sample else 0)
        self.crcs.append(crc)
        self.n_samples += 1
        self.waiting.append(sample)
        if len(self.waiting) == self.samples_per_pack:
            self.write_pack()

    def write_pack(self) -> None:
        """Write the waiting samples."""
        tensors = {}
        for key, dtype in self.dtypes.items():
            rows = [sample[key] for sample in self.waiting if key in sample]
            place = 0
            for sample in self.waiting:
                self.offsets[key].append(place if key in sample else -1)
                place += sample[key].numel() * dtype.itemsize if key in sample else 0
            if rows:
                is_regular = all(row.shape == rows[0].shape for row in rows)
                tensors[key] = torch.stack(rows) if is_regular else torch.cat([row.reshape(-1) for row in rows])
        content = safetensors.torch.save(tensors, {"format": "pt"})
        replace_file(self.folder / pack_name(len(self.sizes)), content)
        self.sizes.append(len(content))
        self.waiting = []

    def close(self, index: Path, entries: Sequence[Any]) -> dict[str, Any]:
        """Write the last pack and the index, and delete packs of a former content. Returns: what the manifest says."""
        if self.waiting:
            self.write_pack()
        for file in self.folder.glob("*.safetensors"):
            if not file.stem.isdigit() or int(file.stem) >= len(self.sizes):
                file.unlink()
        if not self.n_samples:
            index.unlink(missing_ok=True)
            return {"samples": 0, "files": []}
        # Columns of what is not the same in all samples.
        numbers, tensors = {CRC: np.frombuffer(self.crcs, np.uint32)}, []
        for key, shape in self.shapes.items():
            is_everywhere = min(self.offsets[key]) >= 0
            tensors.append([key, str(self.dtypes[key]).removeprefix("torch."), shape, is_everywhere])
            if None in shape or not is_everywhere:
                numbers[f"@{key}"] = np.frombuffer(self.offsets[key], np.int64)
            for axis, size in enumerate(shape):
                if size is None:
                    numbers[f"@{key}.{axis}"] = np.frombuffer(self.axes[key][axis], np.int32)
        summary = write_columns(index, entries, numbers, distinct=DISTINCT)
        size, digest = index.stat().st_size, digest_file(index).hex()
        table = {"samples": self.n_samples, "bytes": size, "sha256": digest}
        return {**table, "tensors": tensors, **summary, "files": self.sizes}


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def unpack(source: Path, target: Path, manifest: Record, *, is_repair: bool = False) -> dict[str, Any]:
    """Write the samples of a packed cache to a file each, and the manifest; the caller holds the lock of the target.

    Args:
        target: may be the source, whose packs are then deleted at the end.
        is_repair: whether samples that cannot be read are left out of the folder, not of the manifest, for the
            preprocessing to write them again.
    Returns: the manifest of the target.
    Raises: ValueError: a sample is damaged.
    """
    splits = manifest[PACKS]["splits"]
    entries, n_changed = {}, 0
    for split, table in splits.items():
        folder = folder_of(target, split)
        folder.mkdir(parents=True, exist_ok=True)
        entries[split] = []
        for entry, sample in samples_of(source, split, manifest, is_repair=is_repair) if table["samples"] else ():
            entries[split].append(entry)
            if sample is None:
                continue
            digest = save_tensors(folder / f"{entry['key']}.pt", sample)
            # Another version of torch wrote the file that was packed.
            if "crc32" in entry and any(entry[name] != value for name, value in digest.items()):
                entry.update(digest)
                n_changed += 1
    if n_changed:
        logger.info("%s: %d files differ from those that were packed, as another version of torch wrote these; the "
                    "tensors are the same", target, n_changed)  # fmt: skip
    # Duplicates stand in the manifest with digests of their own.
    digests = {entry["key"]: entry for entry in entries.pop(DUPLICATES, [])}
    for row in manifest.get(DUPLICATES, []):
        digest = digests.get(row["key"], {})
        row.update({name: digest[name] for name in ("bytes", "crc32") if name in row and name in digest})
    result = write_manifest(target, with_field(manifest, PACKS, "entries", entries))
    remove_packs(target)
    return result


def samples_of(folder: Path, split: str, manifest: Record, *, is_repair: bool) -> Iterator[tuple[Any, Any]]:
    """The entries of a packed split with their tensors; None where a sample cannot be read and may be left out."""
    remedy = "the command that made the cache"
    try:
        columns = open_columns(folder / f"{split}.arrow", manifest[PACKS]["splits"][split], remedy)
    except (OSError, ValueError) as error:
        if not is_repair:
            raise
        logger.warning("%s; all samples of this split are written again", error)
        return
    packs = Packs(folder, split, manifest, entries=columns, remedy=remedy, is_repair=is_repair)
    damaged = set()
    for index, entry in enumerate(columns):
        sample, file = None, packs.path_of(index)
        try:
            sample = packs.read(index, check=True)
        except ValueError as error:
            if not is_repair:
                raise
            if file not in damaged:
                logger.warning("%s; all samples of this pack that cannot be read are written again", error)
            damaged.add(file)
        yield entry, sample


def remove_packs(folder: Path) -> None:
    """Delete packs and indices of a folder whose manifest no longer names them."""
    for split in ("train", "validation", DUPLICATES):
        (folder / f"{split}.arrow").unlink(missing_ok=True)
        for file in (folder / split).glob("*.safetensors"):
            file.unlink()
    if (folder / DUPLICATES).is_dir():
        (folder / DUPLICATES).rmdir()


def copy_others(source: Path, target: Path) -> None:
    """Copy what a cache holds beside its samples, such as an aligner or a VAE."""
    names = {MANIFEST, JOURNAL, LOCK, "train", "validation", DUPLICATES}
    for path in sorted(source.iterdir()):
        if path.name in names or path.name.startswith(".") or path.suffix == ".arrow":
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            with replacing(target / path.name, sync=True) as temporary:
                shutil.copyfile(path, temporary)


def pack_in_place(folder: Path, samples_per_pack: int) -> None:
    """Pack a complete cache; the caller holds its lock."""
    manifest = pack(folder, folder, read_manifest(folder, None), samples_per_pack)
    n_packs = sum(len(table["files"]) for table in manifest[PACKS]["splits"].values())
    logger.info("%s: packed into %d files", folder, n_packs)


def unpack_in_place(folder: Path, header: dict[str, Any]) -> None:
    """Unpack a packed cache, so that samples can be added; the caller holds its lock.

    Args: header: of the run that adds them.
    Raises: ValueError: the cache was made with other settings, or has more samples than the run asks for.
    """
    if (folder / MANIFEST).is_file() and is_packed(manifest := read_manifest(folder, None)):
        check_same(folder, manifest, header)
        check_no_fewer(folder, manifest, header)
        unpack(folder, folder, manifest, is_repair=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m dataset_loading.pack", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="cache, packed or not")
    parser.add_argument("target", type=Path, metavar="DST", help="folder of the other form")
    parser.add_argument("--pack", type=int, help=f"samples per pack (default: {SAMPLES_PER_PACK})")
    args = parser.parse_args(argv)
    if args.pack is not None and args.pack < 1:
        parser.error(f"--pack={args.pack} must be > 0")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        manifest = convert(args.source, args.target, args.pack)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        sys.exit(2)
    logger.info("%s is written, fingerprint %s", args.target, manifest["fingerprint"])


if __name__ == "__main__":
    main()
