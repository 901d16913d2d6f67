"""A cache of synthetic log-mels that spell their transcripts, for the audio VAE's stage."""

import json
from pathlib import Path

import torch

from dataset_loading.cache_writer import save_tensors
from dataset_loading.files import MANIFEST, SCHEMA
from model.audio.spectral import MelSettings

SETTINGS = MelSettings(n_mels=16)
SMALL_AUDIO_VAE = """
    --config tiny --override width=24 latent_channels=6 n_encoder_blocks=1 n_decoder_blocks=1 --learning_rate 1e-3
    --logging_steps 1 --eval_steps 1000 --save_steps 1000 --segment_frames 32 --eval_batch_size 3
    --discriminator_channels 8 --discriminator_layers 2 --gan_start_step 2 --gan_warmup_steps 2 --gan_ramp_steps 4
    --r1_weight 1 --r1_every 2 --n_logged_samples 0""".split()  # noqa: SIM905

LETTERS = "abcd"
SPEAKERS = ("high", "low")


def letters_mel(text: str, settings: MelSettings, *, frames_per_letter: int, level: float, seed: int) -> torch.Tensor:
    """(M, F): a pattern per letter, silence between letters, at a speaker's level, with a little noise."""
    bins = torch.arange(settings.n_mels) / settings.n_mels
    patterns = [3 * torch.cos(2 * torch.pi * (k + 1) * bins) for k in range(len(LETTERS))]
    pause = torch.full((settings.n_mels, 2), -3.0)
    parts = [part for c in text for part in (patterns[LETTERS.index(c)][:, None].repeat(1, frames_per_letter), pause)]
    mel = torch.cat([pause, *parts], 1) - 5 + level
    noise = torch.randn(mel.shape, generator=torch.Generator().manual_seed(seed))
    return (mel + 0.3 * noise).clamp_min(settings.log_floor)


def write_mel_cache(folder: Path, settings: MelSettings, n_clips: int = 40, *, speakers: bool = True) -> Path:
    """Clips of 8 to 60 frames, a tenth for validation; among them one of silence, one constant, one of one frame."""
    entries: dict[str, list[dict]] = {"train": [], "validation": []}
    for i in range(n_clips):
        split = "validation" if i % 10 == 9 else "train"
        text = "".join(LETTERS[(i * 7 + j * j + i * j) % 4] for j in range(1 + i % 7))
        speaker = SPEAKERS[i % 2]
        mel = letters_mel(
            text, settings, frames_per_letter=4 + i % 3, level=1.0 if speaker == "high" else -1.0, seed=i
        )
        if i in (4, 5, 6):
            mel = [torch.full_like(mel, settings.log_floor), torch.full_like(mel, -4.0), mel[:, :1]][i - 4].clone()
        key = f"{i:03}"
        (folder / split).mkdir(parents=True, exist_ok=True)
        save_tensors(folder / split / f"{key}.pt", {"mel": mel})
        seconds = mel.shape[1] * settings.hop_length / settings.sample_rate
        row = {"key": key, "source": f"{key}.flac", "copy": 0, "caption": text, "seconds": seconds}
        entries[split].append({**row, "speaker": speaker if speakers else "", "length": mel.shape[1]})
    manifest = {
        "schema": SCHEMA,
        "stage": "audio_vae",
        "settings": {"mel": settings.as_dict()},
        "fingerprint": f"{settings.n_mels}-{n_clips}",
        "command": ["preprocess_audio_vae_dataset.py", "--dataset_name", "letters", "--output_dir", str(folder)],
        "entries": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder
