"""Caches with a file per sample beside packed ones: start-up and memory, reading, writing, disk.

    python benchmarks/caches.py --part start --samples 60000 200000
    python benchmarks/caches.py --part start --samples 1000000 10000000 --form packed
    python benchmarks/caches.py --part read --samples 5000 --image_size 32

Part `start` opens synthetic caches in a process each: files per sample are hard links, packs are sparse. CPU seconds
of opening one split, and of that, the first 1000 places of an epoch and 100 samples; growth of the process's own
memory, and of mapped files, which processes share. Part `read` writes images of noise in both forms (CPU seconds),
reads all of them in random order, warm (CPU seconds) and after the page cache was dropped (seconds on the clock), and
compares bytes on the disk.
"""

import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.columns import ROWS, write_columns
from dataset_loading.epoch_sampler import EpochSampler
from dataset_loading.files import SCHEMA, digest_file, read_manifest
from dataset_loading.image.pixels import ImageDataset
from dataset_loading.pack import pack
from dataset_loading.packs import CRC, PACKS, pack_name
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

logger = logging.getLogger(__name__)

LINKS = 30_000  # Hard links of one file; file systems allow some 65,000.


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    part: Literal["start", "read"] = option("start", "what is measured")
    form: Literal["both", "files", "packed"] = option("both", "form of the caches", only_with=("part", "start"))
    samples: list[int] = option([60_000], "numbers of samples")
    samples_per_pack: int = option(1000, "samples of a pack", gt=0)
    image_size: int = option(32, "side of the images in pixels", gt=0)
    folder: str = option("", "folder for the caches, which are deleted at the end; default: that for temporary files")

    def validate_samples(self):
        if min(self.samples, default=0) < 1:
            raise ValueError(f"--samples={self.samples} must name numbers above 0")


def entry_of(number: int, digest: dict[str, Any]) -> dict[str, Any]:
    """The entry of a sample as preprocessing writes it."""
    state = {"source_bytes": 2000 + number % 999, "source_mtime_ns": 10**18 + number, "source_ctime_ns": 10**18}
    source = {"source": f"images/{number:08d}.png", "copy": 0, **digest, **state, "source_sha256": f"{number:032x}"}
    return {"key": f"images_{number:08d}-{number:012x}", **source, "caption": f"image {number}", "length": 32}


def header_of(image_size: int) -> dict[str, Any]:
    """A manifest without samples."""
    settings = {"image_size": image_size}
    return {"schema": SCHEMA, "stage": ImageDataset.stage, "fingerprint": "0", "settings": settings, "command": ["x"]}


def link_files(folder: Path, n: int, image_size: int) -> None:
    """A cache of `n` equal images, whose files are hard links."""
    (folder / "train").mkdir(parents=True)
    entries, sample = [], {"image": torch.zeros(3, image_size, image_size, dtype=torch.uint8)}
    for number in range(n):
        if number % LINKS == 0:
            original = folder / f"original-{number}.pt"
            digest = save_tensors(original, sample)
        entries.append(entry_of(number, digest))
        os.link(original, folder / "train" / f"{entries[-1]['key']}.pt")
    write_manifest(folder, {**header_of(image_size), "entries": {"train": entries, "validation": []}})


def sparse_packs(folder: Path, n: int, image_size: int, samples_per_pack: int) -> None:
    """A packed cache of `n` black images: the packs are sparse, and the rows of the index repeat after 65,536."""
    (folder / "train").mkdir(parents=True)
    shape, n_bytes = [3, image_size, image_size], 3 * image_size**2
    sizes = []
    for number in range(-(-n // samples_per_pack)):
        n_samples = min(samples_per_pack, n - number * samples_per_pack)
        header = {"image": {"dtype": "U8", "shape": [n_samples, *shape], "data_offsets": [0, n_samples * n_bytes]}}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / "train" / pack_name(number), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + n_samples * n_bytes)
        sizes.append(8 + len(text) + n_samples * n_bytes)
    safetensors.torch.load_file(folder / "train" / pack_name(0))
    # One batch of rows, written as often as needed.
    digest = {"bytes": n_bytes, "crc32": f"{0:08x}"}
    rows = [entry_of(number, digest) for number in range(min(n, ROWS))]
    index, numbers = folder / "train.arrow", {CRC: np.full(len(rows), zlib.crc32(bytes(n_bytes)), np.uint32)}
    summary = write_columns(index, rows, numbers, distinct=())
    if n > ROWS:
        reader = pa.ipc.open_file(pa.OSFile(str(index)))
        batch = reader.get_batch(0)
        with pa.OSFile(str(folder / "repeated"), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
            for start in range(0, n, ROWS):
                writer.write_batch(batch.slice(0, min(ROWS, n - start)))
        os.replace(folder / "repeated", index)
    table = {"samples": n, "bytes": index.stat().st_size, "sha256": digest_file(index).hex(), **summary}
    table |= {"tensors": [["image", "uint8", shape, True]], "files": sizes}
    splits = {"train": table, "validation": {"samples": 0, "files": []}}
    write_manifest(folder, {**header_of(image_size), PACKS: {"samples_per_pack": samples_per_pack, "splits": splits}})


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process: its own, and pages of mapped files, which processes share."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(rows[key].split()[0]) for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def measure_start(folder: Path) -> dict[str, float]:
    """Open a cache and read a few samples, in this process."""
    started, before = time.process_time(), resident_bytes()
    data = ImageDataset(folder, "train")
    opened, opened_bytes = time.process_time(), resident_bytes()
    places = list(itertools.islice(EpochSampler(len(data), 1, seed=0), 1000))
    for place in places[:100]:
        data[place]
    row, after = {"seconds": opened - started, "seconds_with_order": time.process_time() - started}, resident_bytes()
    opened_mb = {f"{name}_mb": (opened_bytes[name] - before[name]) / 1e6 for name in before}
    return {**row, **opened_mb, **{f"{name}_mb_after": (after[name] - before[name]) / 1e6 for name in before}}


def start(args: BenchmarkArguments, folder: Path) -> Iterator[dict[str, Any]]:
    """Start-up of caches of all sizes, each in a process of its own."""
    for n in args.samples:
        for form in ("files", "packed") if args.form == "both" else (args.form,):
            cache = folder / f"{form}-{n}"
            if form == "files":
                link_files(cache, n, args.image_size)
            else:
                sparse_packs(cache, n, args.image_size, args.samples_per_pack)
            code = (
                f"import json; from benchmarks.caches import *; print(json.dumps(measure_start(Path({str(cache)!r}))))"
            )
            root = Path(__file__).resolve().parent.parent
            output = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
            yield {"form": form, "samples": n, **json.loads(output.stdout.splitlines()[-1])}


def drop_pages(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds_of(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one call."""
    started = clock()
    run()
    return clock() - started


def read(args: BenchmarkArguments, folder: Path) -> Iterator[dict[str, Any]]:
    """Writing, reading and disk of both forms with the same images of noise."""
    for n in args.samples:
        generator, files, packed = torch.Generator().manual_seed(0), folder / f"files-{n}", folder / f"packed-{n}"
        (files / "train").mkdir(parents=True)
        entries: list[dict[str, Any]] = []

        def write_files(files=files, n=n, entries=entries, generator=generator):
            shape = (3, args.image_size, args.image_size)
            for number in range(n):
                image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
                entry = entry_of(number, {})
                entries.append({**entry, **save_tensors(files / "train" / f"{entry['key']}.pt", {"image": image})})
            write_manifest(files, {**header_of(args.image_size), "entries": {"train": entries, "validation": []}})

        def write_packed(files=files, packed=packed):
            packed.mkdir()
            pack(files, packed, read_manifest(files, None), args.samples_per_pack)

        seconds = {"files": seconds_of(write_files), "packed": seconds_of(write_packed)}
        for form, cache in (("files", files), ("packed", packed)):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()

            def read_all(cache=cache, order=order, data: CachedDataset | None = None):
                data = data or ImageDataset(cache, "train")
                data.in_memory = None
                for place in order:
                    data.read(place)

            data = ImageDataset(cache, "train")
            row = {"first": seconds_of(read_all), "again": 0.0}
            read_all(data=data)
            row["again"] = seconds_of(lambda read_all=read_all, data=data: read_all(data=data))
            drop_pages(cache)
            row["cold"] = seconds_of(read_all, time.perf_counter)
            times = {f"{name}_us": 1e6 * value / n for name, value in {"write": seconds[form], **row}.items()}
            used = sum(file.stat().st_blocks * 512 for file in cache.rglob("*") if file.is_file())
            yield {"form": form, "samples": n, **times, "disk_bytes_per_sample": used / n}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(BenchmarkArguments, argv, __doc__ or "")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with explained_errors(logger), tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        for row in {"start": start, "read": read}[args.part](args, Path(folder)):
            print(
                json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}), flush=True
            )


if __name__ == "__main__":
    main()
