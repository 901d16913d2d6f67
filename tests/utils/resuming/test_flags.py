from types import SimpleNamespace

import pytest

from utils.resuming.flags import Resumption, check_samples
from utils.resuming.saved_files import check_engine


@pytest.mark.parametrize("zero, ranks, message", [(2, 1, "2 processes, this run has 1"), (-1, 2, "without DeepSpeed")])
def test_another_engine_is_refused(tmp_path, zero, ranks, message):
    record = {"zero_stage": 2, "n_ranks": 2}
    with pytest.raises(ValueError, match=message):
        check_engine(tmp_path, record, zero_stage=zero, n_ranks=ranks)
    check_engine(tmp_path, record, zero_stage=2, n_ranks=2)


@pytest.mark.parametrize("zero_stage", [-1, 0])
def test_other_number_of_ranks_is_fine_without_sharding(tmp_path, zero_stage):
    check_engine(tmp_path, {"zero_stage": zero_stage, "n_ranks": 2}, zero_stage=zero_stage, n_ranks=1)


def test_samples_per_step_may_be_split_in_another_way(tmp_path):
    old = {"batch_size": 4, "gradient_accumulation_steps": 1}
    resumption = Resumption(tmp_path / "checkpoint-1", {"n_ranks": 2}, old, {})
    for split in ((8, 1, 1), (4, 2, 1), (2, 2, 2)):
        args = SimpleNamespace(batch_size=split[0], gradient_accumulation_steps=split[1])
        check_samples(resumption, args, split[2])
    args = SimpleNamespace(batch_size=3, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r"checkpoint 4 x 1 x 2, this run 3 x 1 x 1.*Give another --batch_size"):
        check_samples(resumption, args, 1)
