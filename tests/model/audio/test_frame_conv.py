"""Convolutions along frames: equal to Conv1d, and to themselves with kernels laid out for the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model.audio.frame_conv import FrameConv, prepack


@pytest.mark.parametrize("groups", [1, 24])
def test_other_layouts_of_the_kernel_change_no_result(groups):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(FrameConv(24, 48, 5, padding=2, groups=groups))
    packed, x = copy.deepcopy(plain), torch.randn(2, 17, 24)
    prepack(packed)
    # The kernel (out, in, size) is read as an image of one row whose channels lie last.
    assert packed[0].weight.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)
    assert groups > 1 or not packed[0].weight.is_contiguous()
    assert all(map(torch.equal, plain.state_dict().values(), packed.state_dict().values()))
    reference = F.conv1d(x.transpose(1, 2), plain[0].weight, plain[0].bias, padding=2, groups=groups).transpose(1, 2)
    for model in (plain, packed):
        torch.testing.assert_close(model(x), reference, rtol=1e-5, atol=1e-6)
