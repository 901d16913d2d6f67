r"""Turn audio and its texts into an audio VAE's latents; the next stage is pretrain_audio_diffusion.py.

    python preprocess_audio_diffusion_dataset.py --audio_cache cached_datasets/audio_vae \
        --vae_checkpoint runs/audio_vae/demo
    python preprocess_audio_diffusion_dataset.py --dataset_name my_speech --vae_checkpoint runs/audio_vae/demo \
        --language fr-fr
    python preprocess_audio_diffusion_dataset.py --dataset_name my_sounds --vae_checkpoint runs/audio_vae/demo \
        --conditioning caption --text_encoder google/t5-v1_1-base

A file holds {"mean": (Z, L) float16, "std": (Z, L) float16, "n_mel_frames": ()}: mean and std of the latents'
posterior, standardised with the VAE's latent statistics; latent rows are further channels. For speech also the
transcript as "tokens": (T, 3) int16 (symbol, stress, word edge; see model/text/phonemes.py) with "durations": (T,)
int16 in mel frames, whose sum is n_mel_frames, and how well both fit: "log_likelihood" and "likelihood_ratio" per
frame. For captions "caption_tokens": (S,) int16 bytes, or "caption_states": (S, E) bfloat16 of a frozen text encoder.
The folder also holds aligner.safetensors, and the manifest the table of symbols. A raw data set is turned into
log-mels first, in <output_dir>_mels.
"""

import dataclasses
from typing import Any

import torch

from model.audio.lengths import latents_to_sequence
from model.text.feature_extractors import FrozenTextEncoder
from utils.checkpoints import resolve_checkpoint
from utils.devices import compute_device
from utils.generation.latents import load_vae, standardized_posterior, vae_fingerprint
from utils.generation.text_encoder import caption_states, text_encoder_fingerprint
from utils.options import option
from utils.preprocessing.audio_latents import AudioLatentsArguments, AudioLatentsPreprocess
from utils.preprocessing.samples import Example, SkipSampleError


@dataclasses.dataclass
class AudioDiffusionPreprocessArguments(AudioLatentsArguments):
    """Flags of this stage."""

    vae_checkpoint: str = option("", "run or checkpoint folder of the audio VAE; its averaged weights are used")
    vae_config: str = option("", "preset that the VAE must have been trained with; default: any")
    text_encoder: str = option(
        "",
        "frozen text encoder whose hidden states of captions are stored: local folder or hub name; default: bytes",
        only_with=("conditioning", "caption"),
    )

    def validate_vae(self):
        if not self.vae_checkpoint:
            raise ValueError("--vae_checkpoint is missing: give a run of pretrain_audio_vae.py, runs/audio_vae/NAME")


class AudioDiffusionPreprocess(AudioLatentsPreprocess):
    name = "audio_diffusion"
    arguments_class = AudioDiffusionPreprocessArguments
    models = ("vae", "text_encoder")

    def __init__(self, args: AudioDiffusionPreprocessArguments):
        checkpoint = resolve_checkpoint(args.vae_checkpoint)
        self.vae = load_vae(checkpoint, args.vae_config, media="audio")
        super().__init__(args, self.vae.config.mel, f"the audio VAE {checkpoint}")
        self.vae_fingerprint = vae_fingerprint(checkpoint)
        self.vae_speakers: list[str] = self.vae.config.speakers
        self.text_encoder = FrozenTextEncoder(args.text_encoder) if args.text_encoder else None
        self.text_fingerprint = text_encoder_fingerprint(self.text_encoder) if self.text_encoder else ""

    def settings(self) -> dict[str, Any]:
        vae, text = self.vae.config, self.text_encoder
        return {
            **super().settings(),
            "bf16": self.args.bf16,
            "latent_channels": vae.latent_channels * vae.n_rows,
            "mel_frames_per_latent": vae.compression,
            "vae_fingerprint": self.vae_fingerprint,
            "text_encoder_fingerprint": self.text_fingerprint,
            "text_embedding_width": text.width if text else 0,
        }

    def information(self) -> dict[str, Any]:
        paths = {"vae_checkpoint": self.args.vae_checkpoint, "text_encoder": self.args.text_encoder}
        return {**super().information(), **paths}

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        speaker = example.notes["speaker"]
        if self.vae_speakers and speaker not in self.vae_speakers:
            raise SkipSampleError(f"the VAE knows no speaker {speaker!r} (speakers: {', '.join(self.vae_speakers)})")
        return super().encode(example, generator)

    @torch.inference_mode()
    def encode_batch(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        vae, args = self.vae.to(compute_device()), self.args
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=args.bf16):
            latents = [self.encode_mel(example) for example in examples]
            if args.conditioning == "speech":
                texts = self.align(examples)
            elif self.text_encoder:
                self.text_encoder.model.to(vae.device)
                states = caption_states(self.text_encoder, [example.caption for example in examples], args.max_tokens)
                texts = [{"caption_states": row} for row in states]
            else:
                texts = [{"caption_tokens": example.data["caption_tokens"]} for example in examples]
        return [{**latent, **text} for latent, text in zip(latents, texts, strict=True)]

    def encode_mel(self, example: Example) -> dict[str, torch.Tensor]:
        """Mean and std (Z, L) of one clip: alone, so that its latents do not depend on the clips around it."""
        mel, device = example.data["mel"], self.vae.device
        names = self.vae_speakers
        speaker = torch.tensor([names.index(example.notes["speaker"])], device=device) if names else None
        posterior = standardized_posterior(self.vae, mel[None].to(device), speaker=speaker)
        mean, std = (latents_to_sequence(latents)[0].T.half().cpu() for latents in posterior)
        return {"mean": mean, "std": std, "n_mel_frames": torch.tensor(mel.shape[1])}


if __name__ == "__main__":
    AudioDiffusionPreprocess.main()
