import json
import logging

import pytest
import torch

from benchmarks.caches import link_files, main, measure_start, sparse_packs
from dataset_loading.columns import ROWS
from dataset_loading.image.pixels import ImageDataset


@pytest.fixture(autouse=True)
def own_handlers():
    yield
    logging.getLogger().handlers.clear()


def test_synthetic_caches_are_caches(tmp_path):
    link_files(tmp_path / "files", 12, 8)
    # More rows than a batch of the index has.
    sparse_packs(tmp_path / "packed", ROWS + 300, 8, 1000)
    for name, n in (("files", 12), ("packed", ROWS + 300)):
        data = ImageDataset(tmp_path / name, "train")
        assert len(data) == n and torch.equal(data[n - 1]["image"], torch.full((3, 8, 8), -1.0))
        assert measure_start(tmp_path / name)["seconds"] >= 0


def test_both_forms_are_read(tmp_path, capsys):
    main(["--part", "read", "--samples", "6", "--image_size", "8", "--folder", str(tmp_path)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["form"] for row in rows] == ["files", "packed"] and all(row["again_us"] > 0 for row in rows)
    assert rows[1]["disk_bytes_per_sample"] < rows[0]["disk_bytes_per_sample"] and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["--samples", "0"])
