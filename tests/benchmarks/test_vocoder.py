"""The vocoder's benchmark: folders of runs, and what is read from them."""

import json
from pathlib import Path

import pytest

from benchmarks.vocoder import BenchmarkArguments
from benchmarks.vocoder_quality import TIMES, run_folder, saved_models
from tests.helpers.mel_cache import SETTINGS, write_mel_cache
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder
from utils.command_line import parse_arguments


@pytest.fixture
def folder(tmp_path):
    """folder(side, *words): the run's folder, on a cache with `n_clips` clips."""

    def call(side: str, *words, n_clips: int = 10) -> Path:
        cache = write_mel_cache(tmp_path / f"cache{n_clips}", SETTINGS, n_clips)
        manifest = json.loads((cache / "manifest.json").read_text())
        (cache / "manifest.json").write_text(json.dumps({**manifest, "stage": "audio_vocoder"}))
        words = ["--cached_dataset", str(cache), "--output_dir", str(tmp_path / "runs"), *words]
        return run_folder(parse_arguments(BenchmarkArguments, words, ""), side)

    return call


def test_a_folder_is_named_by_all_that_shapes_the_run(folder):
    ours, vocos = folder("ours", "--quality", "2", "10"), folder("vocos", "--quality", "2", "10")
    assert ours == folder("ours", "--quality", "10", "2", "--side", "ours", "--n_clips", "3") and ours != vocos
    assert ours.name.startswith("small_0_42_") and vocos.name.startswith("vocos_16x64_0.0005_42_")
    changed = [folder("ours", "--quality", "2", "--flags", flags) for flags in ("--batch_size 8", "--batch_size 16")]
    changed += [folder("ours", "--quality", "2", n_clips=20), folder("vocos", "--quality", "2", n_clips=20)]
    changed += [folder("vocos", "--quality", "2", "20"), folder("ours", "--quality", "2", "--seed", "7")]
    assert len({ours, vocos, *changed}) == 8
    # The minutes end our run, and shape that of Vocos.
    assert folder("ours", "--quality", "2") == ours and folder("vocos", "--quality", "1", "10") == vocos


def test_runs_of_either_side_are_read_from_their_folders(tmp_path):
    checkpoint = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "ours")
    assert saved_models(checkpoint.parent, "a") == {"a, ? CPU min, 4 steps": checkpoint}
    (checkpoint.parent / TIMES).write_text(json.dumps({"2.5": 4}))
    assert saved_models(checkpoint.parent, "a") == {"a, 2.5 CPU min, 4 steps": checkpoint}
    vocos = tmp_path / "vocos"
    vocos.mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint and no weights of Vocos"):
        saved_models(vocos, "b")
    files = [vocos / f"{minutes}.pt" for minutes in (2, 10)]
    for file in files:
        file.touch()
    (vocos / TIMES).write_text(json.dumps({"2": 7}))
    titles = ["b, 2 CPU min, 7 steps", "b, 10 CPU min, ? steps"]
    assert saved_models(vocos, "b") == dict(zip(titles, files))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run_dirs runs/a --quality 2", "give one of them"),
        ("--run_dirs runs/a --side ours", "--side has no effect with quality"),
        ("--n_clips 3", "--n_clips has no effect without --quality or --run_dirs"),
        ("--only training --bf16", "--bf16 has no effect without the inference comparison"),
    ],
)
def test_flags_without_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(BenchmarkArguments, words.split(), "")
    assert message in capsys.readouterr().err
    assert parse_arguments(BenchmarkArguments, ["--run_dirs", "runs/a", "--n_clips", "3"], "").n_clips == 3
