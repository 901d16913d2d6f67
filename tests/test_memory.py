"""Memory in proportion to a block of a file: an hour of stereo within 1.5 GB of address space beyond the packages'."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tests.helpers.sounds import tone

# Imports take address space, too; the limit counts from there.
LIMITED = """
import resource, sys
import preprocess_audio_vae_dataset as script
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
limit = size + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
script.AudioVAEPreprocess.main(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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
    assert '"seconds": 3600.0' in run.stderr and int(run.stdout) < 1_500_000  # KiB that were in memory
    # The limit holds: less than the result needs is an error.
    small = preprocess_limited(150_000_000, "--dataset_name", folder, "--output_dir", tmp_path / "small")
    assert small.returncode != 0
