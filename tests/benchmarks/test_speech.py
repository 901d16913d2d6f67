"""The benchmark of speech: sides of equal size, a peer that ignores padding, and parts that add up to a waveform."""

import pytest
import torch

from benchmarks.peers.speech import MatchaDecoder
from benchmarks.speech import SIZES, BenchmarkArguments, load_pipeline, speak, training_steps
from model.audio.diffusion import AudioDiffusion


@pytest.mark.parametrize("size", SIZES)
def test_both_networks_have_as_many_parameters(size):
    widths, width = SIZES[size]
    with torch.device("meta"):
        sides = AudioDiffusion.from_preset("tiny", widths=widths).network, MatchaDecoder(width)
    ours, theirs = (sum(p.numel() for p in side.parameters()) for side in sides)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_padding_does_not_change_what_the_peer_sees():
    torch.manual_seed(0)
    peer, time = MatchaDecoder(16, n_mels=8).eval(), torch.rand(2)
    x, mean = torch.randn(2, 2, 8, 20)
    mask = (torch.arange(20) < torch.tensor([[20], [12]]))[:, None]
    # Group norm sees padding, as published: what differs is what padding holds.
    other = x.where(mask, 7.0)
    torch.testing.assert_close(peer(x, mean, mask, time), peer(other, mean.where(mask, -3.0), mask, time))


def test_a_step_has_gradients_and_a_sentence_all_parts():
    args = BenchmarkArguments(batch_size=2, frames=48)
    for run in training_steps(args, "tiny", bf16=False).values():
        run()
    spent, seconds = speak(load_pipeline(args), "Hold the line.", n_steps=1, use_durations=False)
    assert list(spent) == ["text", "encoder", "flow", "VAE", "vocoder"] and 0.3 < seconds < 3
