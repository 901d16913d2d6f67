"""Memory in proportion to a block of a file: an hour of stereo within 1.5 GB of address space beyond the packages',
and training where one clip of ten minutes is among short ones."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.files import SCHEMA
from model.audio.spectral import mel_preset
from tests.helpers.audio_cache import SMALL_VOCODER
from tests.helpers.mel_cache import SMALL_AUDIO_VAE
from tests.helpers.sounds import tone

# Imports take address space, too; the limit counts from there.
LIMITED = """
import resource, sys
import preprocess_audio_vae_dataset as script
from utils.devices import peak_memory_gib
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
limit = size + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
script.AudioVAEPreprocess.main(sys.argv[2:])
print(peak_memory_gib())
"""


def preprocess_limited(n_bytes: int, *words):
    words = [*map(str, words), "--num_workers", "0", "--validation_fraction", "0"]
    command = [sys.executable, "-c", LIMITED, str(n_bytes), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux alone")
def test_an_hour_of_stereo_is_preprocessed_in_a_gigabyte(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    minute = np.stack([tone(220, 60, 44100).numpy(), tone(330, 60, 44100).numpy()], 1)
    with soundfile.SoundFile(folder / "hour.wav", "w", 44100, 2, "PCM_16") as file:
        for _ in range(60):
            file.write(minute)
    run = preprocess_limited(1_100_000_000, "--dataset_name", folder, "--output_dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert '"seconds": 3600.0' in run.stderr and float(run.stdout) < 1.43  # GiB that were in memory
    # The limit holds: less than the result needs is an error.
    small = preprocess_limited(150_000_000, "--dataset_name", folder, "--output_dir", tmp_path / "small")
    assert small.returncode != 0


MEASURED = """
import sys
from pretrain_audio_vae import AudioVAEStage
from pretrain_vocoder import VocoderStage
from utils.devices import peak_memory_gib
{"vocoder": VocoderStage, "audio_vae": AudioVAEStage}[sys.argv[1]].main(sys.argv[2:])
print(peak_memory_gib())
"""


def write_long_clip(folder):
    """Noise: 16 clips of a second or two for training and as many to validate, of either one has ten minutes."""
    mel, entries = mel_preset("22k"), {"train": [], "validation": []}
    for number in range(32):
        split, length = ("train", "validation")[number % 2], 80 + 3 * number
        length = 600 * mel.sample_rate // mel.hop_length if number in (6, 7) else length
        generator = torch.Generator().manual_seed(number)
        sample = {
            "mel": torch.randn(mel.n_mels, length, generator=generator) - 5,
            "waveform": torch.rand(length * mel.hop_length, generator=generator) - 0.5,
        }
        (folder / split).mkdir(parents=True, exist_ok=True)
        digest = save_tensors(folder / split / f"{number}.pt", sample)
        entry = {"key": f"{number}", "source": f"{number}.wav", "copy": 0, "caption": "", "speaker": "", **digest}
        entries[split].append({**entry, "length": length, "seconds": length / 86})
    settings = {"mel": mel.as_dict()}
    head = {"schema": SCHEMA, "stage": "audio_vocoder", "fingerprint": "f", "command": ["make.py"]}
    write_manifest(folder, {**head, "settings": settings, "totals": {}, "entries": entries, "duplicates": []})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is known on Linux alone")
@pytest.mark.parametrize("name", ["vocoder", "audio_vae"])
def test_one_long_clip_among_short_ones_does_not_pad_them_all(name, tmp_path):
    cache = write_long_clip(tmp_path / "cache")
    words = ["--cached_dataset", cache, "--output_dir", tmp_path, "--run_name", "long", "--max_steps", "3"]
    words += ["--batch_size", "16", *{"vocoder": SMALL_VOCODER, "audio_vae": SMALL_AUDIO_VAE}[name]]
    words[words.index("--gan_start_step") + 1] = "0"
    if name == "audio_vae":
        words[words.index("--eval_batch_size") + 1] = "16"
    command = [sys.executable, "-c", MEASURED, name, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[-1]) < 1.43  # GiB
