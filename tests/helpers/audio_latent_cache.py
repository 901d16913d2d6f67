"""An audio cache of spoken sentences and a small audio VAE without training, for what makes or reads audio latents."""

import json
from pathlib import Path

import torch

from dataset_loading.audio.signal import resample
from dataset_loading.cache_writer import save_tensors
from dataset_loading.embedded.speech import load_speaker
from dataset_loading.files import MANIFEST, SCHEMA
from model.audio.spectral import LogMel, MelSettings
from model.audio.vae import AudioVAE, AudioVAEConfig
from preprocess_audio_diffusion_dataset import AudioDiffusionPreprocess
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint

SETTINGS = MelSettings(n_mels=40)
SENTENCES = (
    "press one for sales",
    "press two for help, or wait",
    "please hold the line",
    "goodbye",
    "hold one",
    "for help press the pound key",
)
VOICES = {"ann": ("en-us", 60), "bob": ("en-us+m7", 40)}
# A run of text to speech on them.
SMALL_SPEECH = """
    --config tiny --override widths=[16,24] n_blocks=[1,1] n_attentions=[0,1] head_width=8 conditioning_width=16
    text_width=16 frame_width=16 text_dropout=0 --logging_steps 1 --eval_steps 1000 --save_steps 1000
    --n_time_buckets 2 --n_logged_samples 0 --n_steps 2 --batch_frames 256""".split()  # noqa: SIM905


def write_spoken_cache(folder: Path, n_clips: int = 24, settings: MelSettings = SETTINGS) -> Path:
    """`n_clips` sentences in turn by two speakers, a sixth for validation."""
    log_mel, speaker = LogMel(settings), load_speaker()
    entries: dict[str, list[dict]] = {"train": [], "validation": []}
    for i in range(n_clips):
        split = "validation" if i % 6 == 5 else "train"
        text, name = SENTENCES[(i + i // 6) % len(SENTENCES)], list(VOICES)[i % 2]
        voice, pitch = VOICES[name]
        waveform = resample(
            speaker.speak(text, voice, rate=150 + i, pitch=pitch), speaker.sample_rate, settings.sample_rate
        )
        mel = log_mel(waveform[None])[0]
        (folder / split).mkdir(parents=True, exist_ok=True)
        save_tensors(folder / split / f"{i:03}.pt", {"mel": mel})
        row = {"key": f"{i:03}", "source": f"{i:03}.flac", "copy": 0, "caption": text, "speaker": name}
        seconds = mel.shape[1] * settings.hop_length / settings.sample_rate
        entries[split].append({**row, "length": mel.shape[1], "seconds": round(seconds, 4)})
    write_manifest(folder, entries, settings)
    return folder


def write_manifest(folder: Path, entries: dict[str, list[dict]], settings: MelSettings = SETTINGS) -> None:
    """The manifest of an audio cache with some entries."""
    command = ["preprocess_audio_vae_dataset.py", "--dataset_name", "spoken", "--output_dir", str(folder)]
    head = {"schema": SCHEMA, "stage": "audio_vae", "settings": {"mel": settings.as_dict()}, "command": command}
    (folder / MANIFEST).write_text(json.dumps({**head, "fingerprint": "spoken", "entries": entries}))


def save_audio_vae(run_dir: Path, *, latent_mean: float = 0.2, settings: MelSettings = SETTINGS, **fields) -> Path:
    """A checkpoint with latent statistics; another mean is another VAE."""
    torch.manual_seed(0)
    config = {"width": 16, "latent_channels": 5, "n_encoder_blocks": 1, "n_decoder_blocks": 1, **fields}
    vae = AudioVAE(AudioVAEConfig(**{**settings.as_dict(), **config})).eval()
    n_channels = vae.config.latent_channels
    vae.set_latent_statistics(latent_mean * torch.arange(1.0, n_channels + 1), torch.linspace(0.5, 1.5, n_channels))
    return save_stage_checkpoint(vae, "audio_vae", run_dir)


def make_audio_latents(cache: Path, vae: Path, out: Path, *flags: str) -> dict:
    """Preprocess in this process; returns the manifest."""
    words = ["--audio_cache", str(cache), "--vae_checkpoint", str(vae), "--output_dir", str(out)]
    return AudioDiffusionPreprocess.main([*words, "--num_workers", "0", *flags])


def make_speech(folder: Path) -> Path:
    """Spoken sentences (mels), their VAE (vae) and the latents (latents) in a folder; returns the latents."""
    cache, vae = write_spoken_cache(folder / "mels"), save_audio_vae(folder / "vae")
    make_audio_latents(cache, vae, folder / "latents")
    return folder / "latents"
