"""Long clips of speech cut at pauses: pieces follow one another, are whole latent frames, have their own tokens."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dataset_loading.audio.pieces import AudioLatentPieces, Piece, cut_at_pauses
from dataset_loading.cache_writer import save_tensors
from dataset_loading.pack import pack_in_place
from tests.helpers.audio_latent_cache import make_speech


def cuts(durations, pauses, max_frames, multiple=2):
    is_pause = torch.tensor([place in pauses for place in range(len(durations))])
    return cut_at_pauses(torch.tensor(durations), is_pause, max_frames=max_frames, multiple=multiple)


def test_cuts_lie_within_pauses_that_are_long_enough_and_nearest_to_the_middle():
    durations = [4, 10, 9, 10, 3, 10, 6, 10, 5]  # Pauses 4, 9, 3, 6, 5 at 0, 14, 33, 46, 62.
    assert cuts(durations, {0, 2, 4, 6, 8}, 67) == [Piece(0, 67)]
    assert cuts(durations, {0, 2, 4, 6, 8}, 50) == [Piece(0, 48), Piece(48, 67)]
    assert cuts(durations, {0, 2, 4, 6, 8}, 40) == [Piece(0, 18), Piece(18, 48), Piece(48, 67)]
    assert cuts(durations, {0, 4, 8}, 40) == [Piece(0, 67)]  # No pause can be cut: both halves need a latent frame.
    assert all(piece.start % 3 == 0 for piece in cuts(durations, {2, 6}, 40, multiple=3))


def make_pauses(folder: Path) -> None:
    """Give clauses of the training clips pauses of 9 mel frames, which the longest token loses."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["entries"]["train"]:
        file = folder / "train" / f"{entry['key']}.pt"
        sample = torch.load(file, weights_only=True)
        clauses = (sample["tokens"][:, 0] == 2).nonzero()[:, 0].tolist()
        for place in clauses:
            sample["durations"][place] += 9
            sample["durations"][sample["durations"].argmax()] -= 9
        save_tensors(file, sample)
        del entry["crc32"], entry["bytes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_pieces_are_the_whole_clip_in_order_with_silence_at_their_ends(tmp_path):
    folder = make_speech(tmp_path)
    make_pauses(folder)
    whole = AudioLatentPieces(folder, "train", max_frames=0)
    data = AudioLatentPieces(folder, "train", max_frames=48)
    n_clips = len(whole)
    assert len(data) > n_clips and len(data) == len(data.lengths) and max(data.lengths) < max(whole.lengths)
    items = [data[index] for index in range(len(data))]
    assert [item["index"].item() for item in items] == list(range(len(data)))
    for clip in range(n_clips):
        expected = whole[clip]
        pieces = [item for item, (owner, _) in zip(items, data.pieces) if owner == clip]
        for name in ("mean", "std"):
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), expected[name])
        assert sum(piece["n_mel_frames"] for piece in pieces) == expected["n_mel_frames"]
        # A token that is cut in two is a pause, and each half silence.
        tokens = torch.cat([piece["tokens"] for piece in pieces])
        assert len(tokens) == len(expected["tokens"]) + len(pieces) - 1
        spoken = [row for row in tokens[:, 0].tolist() if row not in data.tokenizer.pauses]
        assert spoken == [row for row in expected["tokens"][:, 0].tolist() if row not in data.tokenizer.pauses]
        for piece in pieces:
            assert piece["durations"].sum() == piece["n_mel_frames"] and (piece["durations"] >= 0).all()
            assert len(piece["mean"]) == -(-piece["n_mel_frames"] // 2) == data.lengths[piece["index"]]
            assert torch.equal(piece["tokens"][[0, -1]], expected["tokens"][[0, 0]])
        assert all(before["durations"][-1] > 0 < after["durations"][0] for before, after in pairwise(pieces))


def test_validation_leaves_long_clips_out_and_says_so(tmp_path, caplog):
    folder = make_speech(tmp_path)
    caplog.clear()  # Preprocessing warns of short clips.
    data = AudioLatentPieces(folder, "train", max_frames=0)
    entries, limit = data.entries, sorted(data.lengths)[-2]
    assert data.without_longer(max(data.lengths)) is data and data.entries == entries and not caplog.text
    short = data.without_longer(limit)
    assert len(short) == len(short.entries) == len(entries) - 1 and max(short.lengths) == limit
    assert [len(short[index]["mean"]) for index in range(len(short))] == [entry["length"] for entry in short.entries]
    assert f"1 of {len(entries)} clips of train have more than {limit} latent frames" in caplog.text
    with pytest.raises(ValueError, match=r"--segment_seconds"):
        AudioLatentPieces(folder, "train", max_frames=0).without_longer(1)


@pytest.mark.parametrize("is_packed", [False, True])
def test_clips_after_one_that_is_left_out_stay_the_same(tmp_path, is_packed):
    folder = make_speech(tmp_path)
    if is_packed:
        pack_in_place(folder, 2)
    data = AudioLatentPieces(folder, "train", max_frames=0)
    longest = data.lengths.index(max(data.lengths))
    whole = [data[index] for index in range(len(data)) if index != longest]
    files = [data.file_of(index) for index in range(len(data)) if index != longest]
    short = data.without_longer(max(data.lengths) - 1)
    assert longest < len(short) == len(whole) and files == [short.file_of(index) for index in range(len(short))]
    for index, sample in enumerate(whole):
        assert torch.equal(short[index]["mean"], sample["mean"]) and short[index]["index"] == index
