"""Small caches of image and audio latents with the same texts, VAEs without training, and flags of short runs."""

import json
from pathlib import Path

import torch

from dataset_loading.cache_writer import save_tensors
from dataset_loading.files import MANIFEST, SCHEMA
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.image.vae import ImageVAE
from model.text.phonemes import SpeechTokenizer
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint
from utils.generation.latents import vae_fingerprint

SMALL_STREAMS = """
    --config multimodal-tiny --include_modes text image audio --override hidden_size=32 head_width=16 n_heads=2
    n_layers=1 image_encoder_patch_size=2 --caption_vocab_size 280 --learning_rate 1e-3 --logging_steps 1
    --eval_steps 1000 --save_steps 1000 --n_logged_samples 0""".split()  # noqa: SIM905
SMALL_RECURRENT = ["multimodal-recurrent-tiny" if word == "multimodal-tiny" else word for word in SMALL_STREAMS]
WORDS = ("red", "blue", "bear", "fish", "left", "right")


def text_of(number: int) -> str:
    """The text of an item."""
    return f"a {WORDS[number % 3]} {WORDS[2 + number % 4]} at the {WORDS[(number * 5) % 6]}"


def write_cache(folder: Path, stage: str, settings: dict, samples: dict[int, dict], **fields) -> Path:
    """A cache of samples by their number, of which every fourth is for validation."""
    entries: dict[str, list] = {"train": [], "validation": []}
    for number, tensors in samples.items():
        split = "validation" if number % 4 == 3 else "train"
        (folder / split).mkdir(parents=True, exist_ok=True)
        key = f"{number:03}-{stage}"
        digest = save_tensors(folder / split / f"{key}.pt", tensors)
        entry = {
            "key": key,
            "source": f"{number:03}.{'png' if stage.startswith('image') else 'flac'}",
            "copy": 0,
            "caption": text_of(number),
            **digest,
        }
        kinds = {name: value(tensors) for name, value in fields.items()}
        entries[split].append({**entry, **kinds})
    command = [f"preprocess_{stage}_dataset.py", "--output_dir", str(folder)]
    head = {"schema": SCHEMA, "stage": stage, "settings": settings, "command": command, "fingerprint": stage}
    (folder / MANIFEST).write_text(json.dumps({**head, "entries": entries}))
    return folder


def save_vaes(folder: Path, value: float = 0.1) -> tuple[Path, Path]:
    """Checkpoints of an image VAE and of an audio VAE with latent statistics; another mean `value` is another VAE."""
    torch.manual_seed(0)
    image = ImageVAE.from_preset("tiny", image_size=32).eval()
    audio = AudioVAE(AudioVAEConfig(n_mels=40, width=16, latent_channels=5, n_encoder_blocks=1, n_decoder_blocks=1))
    for vae in (image, audio):
        n_channels = vae.config.latent_channels
        vae.set_latent_statistics(torch.full((n_channels,), value), torch.linspace(0.5, 1.5, n_channels))
    return tuple(
        save_stage_checkpoint(vae, stage, folder / stage)
        for vae, stage in ((image, "image_vae"), (audio.eval(), "audio_vae"))
    )  # type: ignore[return-value]


def make_stream_caches(folder: Path, n: int = 16, *, frames: int = 9) -> list[str]:
    """Caches `image` and `audio` of random latents in a folder; returns the flags that name them.

    Items 0, 1 and 2 have an image alone, n and n + 1 audio alone.
    """
    image_vae, audio_vae = save_vaes(folder)
    generator = torch.Generator().manual_seed(0)

    def posterior(*shape: int) -> dict:
        mean = torch.randn(*shape, generator=generator).half()
        return {"mean": mean, "std": torch.full(shape, 0.1).half()}

    common = {"vae_fingerprint": "", "text_encoder": "", "text_encoder_fingerprint": "", "text_embedding_width": 0}
    common |= {"max_tokens": 64}
    settings = {**common, "image_size": 32, "latent_shape": [16, 4, 4], "horizontal_flip": False}
    settings |= {"vae_fingerprint": vae_fingerprint(image_vae), "vae_checkpoint": str(image_vae)}
    tokens = {"tokens": torch.zeros(3, dtype=torch.int16)}
    write_cache(
        folder / "image", "image_diffusion", settings, {i: {**posterior(16, 4, 4), **tokens} for i in range(n)}
    )

    tokenizer = SpeechTokenizer.fit(["a bear"], units="characters")
    settings = {**common, "conditioning": "speech", "tokenizer": tokenizer.as_dict(), "mel": {}}
    settings |= {
        "latent_channels": 5,
        "mel_frames_per_latent": 2,
        "symbols_fingerprint": "",
        "aligner_fingerprint": "",
    }
    settings |= {"vae_fingerprint": vae_fingerprint(audio_vae), "vae_checkpoint": str(audio_vae)}
    samples = {}
    for number in range(3, n + 2):
        length = frames + number % 5
        speech = {"tokens": torch.zeros(2, 3, dtype=torch.int16), "durations": torch.tensor([length] * 2).short()}
        samples[number] = {**posterior(5, length), "n_mel_frames": torch.tensor(2 * length), **speech}
    fields = {"length": lambda t: t["mean"].shape[1], "mel_frames": lambda t: 2 * t["mean"].shape[1]}
    fields |= {"tokens": lambda t: len(t["tokens"]), "seconds": lambda t: 1.0, "speaker": lambda t: ""}
    write_cache(folder / "audio", "audio_diffusion", settings, samples, **fields)
    return ["--image_latents", str(folder / "image"), "--audio_latents", str(folder / "audio")]
