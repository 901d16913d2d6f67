import pytest
import torch

from dataset_loading.collators import collate_stack


def test_samples_are_stacked_along_a_new_axis():
    batch = collate_stack([{"image": torch.full((3, 2, 2), i), "index": torch.tensor(i)} for i in range(4)])
    assert batch["image"].shape == (4, 3, 2, 2)
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_different_shapes_are_named():
    with pytest.raises(ValueError, match=r"'image' has different shapes .*\(3, 2, 2\), \(3, 4, 4\)"):
        collate_stack([{"image": torch.zeros(3, 2, 2)}, {"image": torch.zeros(3, 4, 4)}])


def test_different_keys_are_named():
    with pytest.raises(ValueError, match=r"\['image'\] and \['image', 'text'\]"):
        collate_stack([{"image": torch.zeros(1)}, {"image": torch.zeros(1), "text": torch.zeros(1)}])
