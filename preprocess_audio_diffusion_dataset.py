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

from utils.command_line import check_flags
from utils.preprocessing.arguments import arguments_or_merge
from utils.preprocessing.audio_arguments import AudioDiffusionPreprocessArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(AudioDiffusionPreprocessArguments), __doc__)

from typing import Any

import torch

from model.audio.lengths import latents_to_sequence
from utils.checkpoints import lasting_name, resolve_checkpoint
from utils.devices import compute_device
from utils.generation.latents import load_vae, pin_vae, standardized_posterior, vae_fingerprint, warn_of_other_vae
from utils.generation.text_encoder import caption_states, lost_by_cut, open_text_encoder, text_encoder_fingerprint
from utils.preprocessing.audio_latents import AudioLatentsPreprocess
from utils.preprocessing.samples import Example


class AudioDiffusionPreprocess(AudioLatentsPreprocess):
    name = "audio_diffusion"
    arguments_class = AudioDiffusionPreprocessArguments
    models = ("vae", "text_encoder")

    def __init__(self, args: AudioDiffusionPreprocessArguments):
        self.checkpoint = resolve_checkpoint(args.vae_checkpoint)
        self.vae = load_vae(self.checkpoint, args.vae_config, media="audio")
        config, name = self.vae.config, f"the audio VAE {self.checkpoint}"
        super().__init__(args, config.mel, compression=config.compression, vae_name=name)
        self.vae_fingerprint = vae_fingerprint(self.checkpoint)
        warn_of_other_vae(self.folder, self.vae_fingerprint)
        self.vae_speakers = config.speakers
        self.text_encoder = open_text_encoder(args.text_encoder) if args.text_encoder else None
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
        paths = {name: lasting_name(getattr(self.args, name)) for name in ("vae_checkpoint", "text_encoder")}
        return {**super().information(), **paths}

    def work(self, tasks):
        pin_vae(self.checkpoint, self.folder)  # A copy, as the VAE's own run may delete the checkpoint.
        return super().work(tasks)

    def lost_text(self, entry: dict[str, Any]) -> str:
        is_caption = self.args.conditioning == "caption"
        return lost_by_cut(entry["caption"], self.args.max_tokens, self.text_encoder) if is_caption else ""

    @torch.inference_mode()
    def encode_batch(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        args, device = self.args, compute_device()
        latents = [self.encode_mel(example.data["mel"], example.notes["speaker"]) for example in examples]
        if args.conditioning == "speech":
            texts = self.align(examples, [row["mean"] for row in latents])
        elif self.text_encoder:
            self.text_encoder.model.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                states = caption_states(self.text_encoder, [example.caption for example in examples], args.max_tokens)
            texts = [{"caption_states": row} for row in states]
        else:
            texts = [{"caption_tokens": example.data["caption_tokens"]} for example in examples]
        return [{**latent, **text} for latent, text in zip(latents, texts, strict=True)]

    @torch.inference_mode()
    def encode_mel(self, mel, speaker):
        # Alone, so that latents do not depend on the clips around them.
        self.check_speaker(speaker)
        vae, names = self.vae.to(compute_device()), self.vae_speakers
        place = torch.tensor([names.index(speaker)], device=vae.device) if names else None
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=self.args.bf16):
            posterior = standardized_posterior(vae, mel[None].to(vae.device), speaker=place)
        mean, std = (latents_to_sequence(latents)[0].T.half().cpu() for latents in posterior)
        return {"mean": mean, "std": std, "n_mel_frames": torch.tensor(mel.shape[1])}


if __name__ == "__main__":
    AudioDiffusionPreprocess.main()
