import itertools
import os

import pytest
import torch

from utils.command_line import parse_arguments
from utils.preprocessing import batched
from utils.preprocessing.arguments import BatchedPreprocessArguments
from utils.preprocessing.batched import BatchedPreprocess
from utils.preprocessing.samples import Example
from utils.preprocessing.workers import map_in_workers


def square_slowly_at_first(number: int) -> int:
    """The first chunk takes longest, so that an order of completion would show."""
    sum(range(2_000_000 if number < 4 else 10))
    return number * number


def fail_at_seven(number: int) -> int:
    if number == 7:
        raise KeyError("seven")
    return number


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_results_come_in_order(n_workers):
    assert list(map_in_workers(square_slowly_at_first, range(100), n_workers)) == [n * n for n in range(100)]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_errors_reach_the_caller(n_workers):
    with pytest.raises(KeyError, match="seven"):
        list(map_in_workers(fail_at_seven, range(20), n_workers))


def test_a_dead_worker_is_an_error():
    with pytest.raises(ChildProcessError, match="fewer --num_workers"):
        list(map_in_workers(os._exit, [9], 1))


class LengthPreprocess(BatchedPreprocess):
    """Files hold the length of their text, the process that read them, and the size of the batch they were in."""

    name, media, suffixes, models = "length", "image", {".png"}, ("counter",)

    def __init__(self, args):
        super().__init__(args)
        self.counter = (number for number in range(1000))  # A generator cannot be sent to a worker.

    def settings(self):
        return {}

    def information(self):
        return {"path": self.args.output_dir}

    def decode(self, media):
        return media["path"]

    def encode(self, example: Example, generator: torch.Generator):
        return {"length": torch.tensor(len(example.data)), "reader": torch.tensor(os.getpid())}

    def encode_batch(self, examples):
        batch = torch.tensor([next(self.counter), len(examples)])
        return [{"batch": batch, **example.data} for example in examples]

    def measure(self, tensors):
        return {"length": 1}


def build(image_folder, out, *flags):
    argv = ["--dataset_name", str(image_folder), "--output_dir", str(out), "--validation_fraction", "0", *flags]
    return LengthPreprocess(parse_arguments(BatchedPreprocessArguments, argv, ""))


def prepare(image_folder, out, *flags):
    manifest = build(image_folder, out, *flags).run()
    files = [out / "train" / f"{entry['key']}.pt" for entry in manifest["entries"]["train"]]
    return manifest, [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("n_workers", ["0", "2"])
def test_batches_follow_the_order_of_the_source(image_folder, tmp_path, n_workers):
    _, samples = prepare(image_folder, tmp_path, "--batch_size", "20", "--limit", "50", "--num_workers", n_workers)
    expected = [[n // 20, 20 if n < 40 else 10] for n in range(50)]
    assert [sample["batch"].tolist() for sample in samples] == expected
    assert all((sample["reader"].item() == os.getpid()) == (n_workers == "0") for sample in samples)


def test_bytes_of_a_full_block_do_not_cut_the_next_one(image_folder, tmp_path, monkeypatch):
    # Of each block of 4 a sample is left out, as by an earlier run; the others have 16 bytes each.
    monkeypatch.setattr(batched, "MAX_BYTES", 64)
    preprocess = build(image_folder, tmp_path, "--batch_size", "4", "--num_workers", "0")
    tasks = (task for task in preprocess.plan(preprocess.open_sources(), {}) if task.number % 4 != 3)
    (tmp_path / "train").mkdir(exist_ok=True)
    outcomes = list(itertools.islice(preprocess.work(tasks), 12))
    files = [preprocess.path("train", entry["key"]) for outcome in outcomes for entry in outcome.entries]
    assert [torch.load(file, weights_only=True)["batch"].tolist()[1] for file in files] == [3] * 12


def test_information_is_shown_but_changes_no_fingerprint(image_folder, tmp_path):
    first, _ = prepare(image_folder, tmp_path / "first", "--limit", "3", "--num_workers", "0")
    second, _ = prepare(image_folder, tmp_path / "second", "--limit", "3", "--num_workers", "0")
    assert first["settings"]["path"] != second["settings"]["path"]
    assert first["fingerprint"] == second["fingerprint"]


def test_samples_hold_no_file_open_on_their_way(image_folder, tmp_path):
    preprocess, before = build(image_folder, tmp_path), len(os.listdir("/proc/self/fd"))
    tasks = preprocess.plan(preprocess.open_sources(), {})
    kept = list(map_in_workers(preprocess.prepare_arrays, tasks, 1))
    assert len(kept) == 72 and len(os.listdir("/proc/self/fd")) < before + 5
