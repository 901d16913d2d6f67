"""Alignments: the search against all paths, the phone HMM on clips whose boundaries are known, and on latents."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from model.audio.alignment import ADAPTATION_FRAMES, PhoneHMM, latents_at_frames, monotonic_alignment
from model.audio.speaker_aligners import SpeakerAligners

PAUSE = 1


def all_durations(n_frames, optional, min_frames):
    """Every allowed row of durations: optional tokens may have 0 frames, though not two in a row."""
    for ends in itertools.combinations_with_replacement(range(n_frames + 1), len(optional) - 1):
        durations = [b - a for a, b in itertools.pairwise([0, *ends, n_frames])]
        is_long = all(d >= min_frames or may_skip for d, may_skip in zip(durations, optional))
        pairs = itertools.pairwise(durations)
        if is_long and not any(a == b == 0 for a, b in pairs):
            yield durations


def score(log_likelihood, durations):
    tokens = torch.arange(len(durations)).repeat_interleave(torch.tensor(durations))
    return log_likelihood[torch.arange(len(tokens)), tokens].sum().item()


@pytest.mark.parametrize("min_frames", [1, 2])
def test_the_search_finds_the_best_of_all_alignments_in_mixed_batches(min_frames):
    generator = torch.Generator().manual_seed(min_frames)
    for _ in range(8):
        B, F, T = 6, 9, 4
        log_likelihood = torch.randn(B, F, T, generator=generator, dtype=torch.float64)
        n_tokens = torch.randint(1, T + 1, (B,), generator=generator)
        n_frames = torch.randint(8, F + 1, (B,), generator=generator)
        optional = torch.rand(B, T, generator=generator) < 0.4
        durations = monotonic_alignment(log_likelihood, n_tokens, n_frames, optional, min_frames=min_frames)
        for b in range(B):
            t, f = int(n_tokens[b]), int(n_frames[b])
            rows = all_durations(f, optional[b, :t].tolist(), min_frames)
            best = max(score(log_likelihood[b, :f, :t], row) for row in rows)
            assert durations[b, :t].sum() == f and durations[b, t:].sum() == 0
            assert score(log_likelihood[b, :f, :t], durations[b, :t].tolist()) == pytest.approx(best, abs=1e-9)


def test_padding_and_the_rest_of_the_batch_change_nothing():
    log_likelihood = torch.randn(3, 20, 6)
    n_tokens, n_frames = torch.tensor([6, 3, 5]), torch.tensor([11, 20, 7])
    together = monotonic_alignment(log_likelihood, n_tokens, n_frames)
    log_likelihood[0, 11:] = torch.nan
    log_likelihood[1, :, 3:] = 100.0
    assert torch.equal(monotonic_alignment(log_likelihood, n_tokens, n_frames), together)
    alone = monotonic_alignment(log_likelihood[2:, :7, :5], n_tokens[2:], n_frames[2:])
    assert torch.equal(together[2:, :5], alone)


def test_too_few_frames_name_the_clip():
    with pytest.raises(ValueError, match=r"clips \[1\].*fewer frames"):
        monotonic_alignment(torch.zeros(2, 5, 4), torch.tensor([2, 4]), torch.tensor([5, 3]))
    optional = torch.tensor([[True, False, True, False]])
    durations = monotonic_alignment(torch.zeros(1, 2, 4), torch.tensor([4]), torch.tensor([2]), optional)
    assert durations.tolist() == [[0, 1, 0, 1]]


def clips(n_clips, seed=0):
    """Clips of 5 symbols in 16 mel bins, each a pattern of its own for 3 to 9 frames; pauses last 0 to 6."""
    generator = torch.Generator().manual_seed(seed)
    patterns = 3 * torch.randn(7, 16, generator=torch.Generator().manual_seed(9)) - 2
    patterns[PAUSE] = -9.0
    mels, symbols, durations = [], [], []
    for _ in range(n_clips):
        phones = torch.randint(2, 7, (8,), generator=generator)
        row = torch.full((17,), PAUSE)
        row[1::2] = phones
        lengths = torch.randint(3, 10, (17,), generator=generator)
        lengths[::2] = (torch.randint(-6, 7, (9,), generator=generator)).clamp_min(0)
        lengths[0] = lengths[-1] = 3
        mel = patterns[row].repeat_interleave(lengths, 0)
        mels.append((mel + 0.5 * torch.randn(mel.shape, generator=generator)).T)
        symbols.append(row)
        durations.append(lengths)
    return mels, symbols, durations


def test_the_hmm_finds_boundaries_from_a_flat_start():
    mels, symbols, true = clips(60)
    aligner = PhoneHMM(7, [PAUSE])
    history = aligner.fit(mels, symbols)
    assert len(history) == 3 and history == sorted(history)
    alignment = aligner.align(mels, symbols)
    errors = []
    for mel, found, expected in zip(mels, alignment.durations, true, strict=True):
        assert found.dtype == torch.int16 and int(found.sum()) == mel.shape[1] and (found[1::2] >= 2).all()
        errors.append((found.cumsum(0) - expected.cumsum(0)).abs()[1:-1].double())
    assert torch.cat(errors).mean() < 0.5  # frames; equal shares are 5 frames off
    # A clip alone has the same alignment and likelihood; a wrong transcript has a far lower one.
    single = aligner.align(mels[3:4], symbols[3:4])
    assert torch.equal(single.durations[0], alignment.durations[3])
    assert single.log_likelihood[0] == pytest.approx(alignment.log_likelihood[3], abs=1e-9)
    wrong = aligner.align(mels[3:4], [symbols[3].flip(0)])
    assert wrong.log_likelihood[0] < min(alignment.log_likelihood)
    assert wrong.likelihood_ratio[0] < 5 * min(alignment.likelihood_ratio) < 0 and max(alignment.likelihood_ratio) <= 0


def test_needed_frames_are_those_of_the_shortest_alignment():
    mels, symbols, _ = clips(10)
    aligner = PhoneHMM(7, [PAUSE])
    aligner.fit(mels, symbols)
    for row in (symbols[0], symbols[0][1::2], torch.tensor([PAUSE, PAUSE, 2]), torch.tensor([PAUSE])):
        n_frames = aligner.needed_frames(row)
        assert aligner.align([mels[0][:, :n_frames]], [row]).durations[0].sum() == n_frames
        if n_frames > 1:
            with pytest.raises(ValueError, match="fewer frames"):
                aligner.align([mels[0][:, : n_frames - 1]], [row])


def test_constant_and_silent_clips_align():
    mels, symbols, _ = clips(10)
    mels[0], mels[1] = torch.full_like(mels[0], -11.5), torch.full_like(mels[1], 1.0)
    aligner = PhoneHMM(7, [PAUSE])
    aligner.fit(mels, symbols)
    assert all(map(torch.isfinite, torch.tensor(aligner.align(mels, symbols).log_likelihood)))
    with pytest.raises(ValueError, match="no clips"):
        aligner.fit([], [])


def test_a_saved_aligner_is_the_same_and_other_files_are_refused(tmp_path):
    mels, symbols, _ = clips(10)
    aligner = PhoneHMM(7, [PAUSE], n_states=1)
    aligner.fit(mels, symbols)
    file = tmp_path / "aligner.safetensors"
    file.write_bytes(aligner.dump())
    loaded = PhoneHMM.load(file)
    assert loaded.dump() == aligner.dump() and loaded.n_states == 1
    assert all(map(torch.equal, loaded.align(mels, symbols).durations, aligner.align(mels, symbols).durations))
    file.write_bytes(b"no such file format")
    with pytest.raises(ValueError, match="holds no aligner"):
        PhoneHMM.load(file)
    with pytest.raises(FileNotFoundError, match="gone"):
        PhoneHMM.load(tmp_path / "gone")


def test_latents_align_from_equal_shares_at_mel_frames():
    mels, symbols, true = clips(60)
    # Latents of pairs of mel frames, in 16 channels.
    pairs = [F.pad(mel, (0, mel.shape[1] % 2), mode="replicate") for mel in mels]
    latents = [latents_at_frames(pair.reshape(16, -1, 2).mean(2).T, mel.shape[1], 2) for pair, mel in zip(pairs, mels)]
    aligner = PhoneHMM(7, [PAUSE], inputs="latents")
    history = aligner.fit(latents, symbols, 4)
    assert history == sorted(history)
    durations = aligner.align(latents, symbols).durations
    errors = [(a.cumsum(0) - b.cumsum(0)).abs()[1:-1].double() for a, b in zip(durations, true)]
    assert torch.cat(errors).mean() < 1 and all(int(a.sum()) == mel.shape[1] for a, mel in zip(durations, mels))


def test_latents_between_latent_frames_are_linear():
    latents = torch.tensor([[0.0, 4.0], [4.0, 0.0], [8.0, 2.0]])
    dense = latents_at_frames(latents, 5, 2)
    assert dense.tolist() == [[0, 4], [1, 3], [3, 1], [5, 0.5], [7, 1.5]]
    assert torch.equal(latents_at_frames(latents, 3, 1), latents)


def test_speakers_with_enough_clips_have_an_hmm_of_their_own(tmp_path):
    """Two speakers whose phones sound unlike, and a third with too few clips."""
    mels, symbols, true = clips(60)
    speakers = ["ann"] * 30 + ["bob"] * 26 + ["cy"] * 4
    mels = [mel.flip(0) if speaker == "bob" else mel for mel, speaker in zip(mels, speakers)]
    aligners = SpeakerAligners(PhoneHMM(7, [PAUSE]))
    aligners.fit(mels, symbols, speakers, min_frames=500)
    assert list(aligners.speakers) == ["ann", "bob"]

    def error(durations, speaker):
        rows = [i for i, name in enumerate(speakers) if name == speaker]
        return torch.cat([(durations[i].cumsum(0) - true[i].cumsum(0)).abs()[1:-1].double() for i in rows]).mean()

    alignment, shared = aligners.align(mels, symbols, speakers), aligners.shared.align(mels, symbols)
    for speaker in ("ann", "bob"):
        assert error(alignment.durations, speaker) < 0.9 * error(shared.durations, speaker)
    assert all(map(torch.equal, alignment.durations[56:], shared.durations[56:]))
    # Likelihoods of all speakers are of one model.
    assert (alignment.log_likelihood, alignment.likelihood_ratio) == (shared.log_likelihood, shared.likelihood_ratio)
    # In a file, where the shared model can be read alone.
    file = tmp_path / "aligner.safetensors"
    file.write_bytes(aligners.dump())
    loaded = SpeakerAligners.load(file)
    assert all(loaded.dump() == aligners.dump() for _ in range(20))  # Its fingerprint is that of a cache.
    assert PhoneHMM.load(file).dump() == aligners.shared.dump()
    assert all(map(torch.equal, loaded.align(mels, symbols, speakers).durations, alignment.durations))


def test_speakers_searched_together_are_as_each_alone():
    mels, symbols, _ = clips(24)
    speakers = ["ann", "bob", "cy"] * 8
    mels = [mel.flip(0) if speaker == "bob" else mel for mel, speaker in zip(mels, speakers)]
    aligners = SpeakerAligners(PhoneHMM(7, [PAUSE]))
    aligners.fit(mels, symbols, speakers, min_frames=0)
    durations = aligners.align(mels, symbols, speakers).durations
    for start, speaker in enumerate(("ann", "bob", "cy")):
        own = slice(start, None, 3)
        # Two rounds of search and estimation on the speaker's clips alone.
        model, prepared = copy.copy(aligners.shared), aligners.shared.prepare(mels[own], symbols[own])
        for _ in range(2):
            model.find_paths(prepared)
            model.estimate(prepared, ADAPTATION_FRAMES, prior=aligners.shared)
        torch.testing.assert_close(aligners.speakers[speaker].mean, model.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(aligners.speakers[speaker].variance, model.variance, rtol=1e-9, atol=1e-9)
        assert all(map(torch.equal, model.align(mels[own], symbols[own]).durations, durations[own]))


def test_one_speaker_needs_no_second_model():
    mels, symbols, _ = clips(10)
    aligners, alone = SpeakerAligners(PhoneHMM(7, [PAUSE])), PhoneHMM(7, [PAUSE])
    assert aligners.fit(mels, symbols, ["ann"] * 10, min_frames=0) == alone.fit(mels, symbols)
    assert not aligners.speakers and aligners.dump() == alone.dump()
