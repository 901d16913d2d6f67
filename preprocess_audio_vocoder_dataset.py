r"""Turn audio into log-mels with their waveforms; the next stage is pretrain_vocoder.py.

    python preprocess_audio_vocoder_dataset.py --dataset_name my_speech --mel 22k --segment_seconds 10 --trim_db 40
    python preprocess_audio_vocoder_dataset.py --dataset_name my_speech --output_dir cached_datasets/augmented \
        --num_augmented_copies 2 --time_stretch --pitch_shift --gain_db
    python preprocess_audio_vocoder_dataset.py --dataset_name my_speech --output_dir cached_datasets/through_vae \
        --through_vae runs/audio_vae/demo

A file holds {"mel": (M, F) fp32, "waveform": (S,) fp32 in [-1, 1]} with S = F * hop_length; the manifest holds
transcripts, speakers and seconds. Augmentations given without a value take a usual one. With --through_vae the
log-mels are reconstructions of an audio VAE beside the recorded waveforms, frame by frame: what a vocoder reads after
the VAE. pretrain_vocoder.py --init_from fine-tunes a vocoder on them.
"""

from utils.command_line import check_flags
from utils.preprocessing.arguments import arguments_or_merge
from utils.preprocessing.audio_arguments import AudioVocoderPreprocessArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(AudioVocoderPreprocessArguments), __doc__)

from typing import Any

import torch

from dataset_loading.collators import collate_audio
from model.audio.vae import AudioVAE
from utils.checkpoints import lasting_name, resolve_checkpoint, warn_of_former_data
from utils.devices import compute_device
from utils.generation.latents import load_vae, vae_fingerprint
from utils.preprocessing.audio import AudioPreprocess, log_mel, with_mel
from utils.preprocessing.batched import BatchedPreprocess
from utils.preprocessing.driver import Preprocess
from utils.preprocessing.samples import Example, SkipSampleError
from utils.seeds import seed_of

MAX_FRAMES = 1 << 16  # Mel frames of a batch with its padding; longer clips come in smaller batches.


class AudioVocoderPreprocess(AudioPreprocess, BatchedPreprocess):
    name = "audio_vocoder"  # written to cached_datasets/audio_vocoder
    arguments_class = AudioVocoderPreprocessArguments
    models = ("vae",)
    chunk = 1

    def __init__(self, args: AudioVocoderPreprocessArguments):
        self.vae: AudioVAE | None = None
        self.vae_settings: dict[str, Any] = {}
        self.vae_speakers: list[str] = []
        if args.through_vae:
            checkpoint = resolve_checkpoint(args.through_vae)
            warn_of_former_data(checkpoint)
            self.vae = load_vae(checkpoint, args.vae_config, media="audio", needs_statistics=False)
            self.vae_settings = {"vae_fingerprint": vae_fingerprint(checkpoint), "bf16": args.bf16}
            self.vae_speakers = self.vae.config.speakers
            args = with_mel(args, self.vae.config.mel, f"the audio VAE {checkpoint}")
        super().__init__(args)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.vae_settings}

    def information(self) -> dict[str, Any]:
        path = {"through_vae": lasting_name(self.args.through_vae)} if self.vae_settings else {}
        return {**super().information(), **path}

    def work(self, tasks):
        # Without a VAE the workers write what they compute.
        return super().work(tasks) if self.vae_settings else Preprocess.work(self, tasks)

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # (S,) -> (M, F), with S = F * hop_length.
        speaker = example.notes["speaker"]
        if self.vae_speakers and speaker not in self.vae_speakers:
            raise SkipSampleError(f"the VAE knows no speaker {speaker!r} (speakers: {', '.join(self.vae_speakers)})")
        return {"mel": log_mel(example.data, self.mel), "waveform": example.data}

    def encode_batch(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        """The waveforms with the VAE's log-mels, of latents sampled from the posterior by seed and key of a clip."""
        if len(examples) > 1 and len(examples) * max(row.data["mel"].shape[1] for row in examples) > MAX_FRAMES:
            middle = len(examples) // 2
            return [*self.encode_batch(examples[:middle]), *self.encode_batch(examples[middle:])]
        return self.reconstruct(examples)

    @torch.inference_mode()
    def reconstruct(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        """`encode_batch` of a batch that fits into memory."""
        assert self.vae is not None, "nothing is encoded in batches without a VAE"
        vae, names = self.vae.to(compute_device()), self.vae_speakers
        batch = collate_audio([example.data for example in examples], log_floor=self.mel.log_floor)
        lengths = batch["n_frames"]  # (B,)
        # Noise of each clip's own shape, so that it does not depend on the clips around it; padding needs none.
        noise = torch.zeros(len(examples), *vae.latent_shape(batch["mel"].shape[-1]))
        for row, example, n_frames in zip(noise, examples, lengths.tolist()):
            shape = vae.latent_shape(n_frames)
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, f"posterior {example.key}"))
            row[..., : shape[-1]] = torch.randn(shape, generator=generator)
        speaker = torch.tensor([names.index(example.notes["speaker"]) for example in examples]) if names else None
        mel, n_frames, noise, speaker = (
            None if tensor is None else tensor.to(vae.device) for tensor in (batch["mel"], lengths, noise, speaker)
        )
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=self.args.bf16):
            mels = vae(mel, n_frames, noise, speaker=speaker).reconstruction.float().cpu()
        mels = mels.clamp_min(self.mel.log_floor)  # As wherever a log-mel of the VAE meets a vocoder.
        return [
            {"mel": mel[:, :n_frames], "waveform": example.data["waveform"]}
            for mel, n_frames, example in zip(mels, lengths.tolist(), examples)
        ]


if __name__ == "__main__":
    AudioVocoderPreprocess.main()
