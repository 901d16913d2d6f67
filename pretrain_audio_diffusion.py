r"""Text to speech: diffusion on the latents of an audio VAE, conditioned on aligned phonemes; or captions to sound.

Before: preprocess_audio_diffusion_dataset.py. After: inference/text_to_speech.py, or for captions
inference/text_to_audio.py.

    python pretrain_audio_diffusion.py --run_name demo --config tiny --vae_checkpoint runs/audio_vae/demo --bf16
    deepspeed --num_gpus=8 pretrain_audio_diffusion.py --use_deepspeed --bf16 --run_name base --config small \
        --vae_checkpoint runs/audio_vae/base --vae_config medium --vocoder_checkpoint runs/vocoder/base
"""

from utils.command_line import check_flags
from utils.training.arguments.diffusion import AudioDiffusionArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(AudioDiffusionArguments, __doc__)

from functools import cached_property

from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents, latent_settings
from dataset_loading.audio.pieces import EVALUATED_LATENTS, AudioLatentPieces
from model.audio.diffusion import AudioDiffusion, AudioDiffusionConfig
from model.presets import AUDIO_DIFFUSION
from utils.evaluation.recordings import folder_of_recordings
from utils.evaluation.spoken_error_rates import SpokenErrorRates
from utils.generation.audio_diffusion import fit_to_audio_latents, load_matching_vocoder
from utils.generation.captions import seconds_of_clips
from utils.generation.speech import SpeechPipeline
from utils.training.audio_diffusion import AudioDiffusionTrainer, check_conditioning, count_frame_steps
from utils.training.audio_diffusion_logging import sound_callback
from utils.training.diffusion import DiffusionStage, check_init_from


class AudioDiffusionStage(DiffusionStage):
    name = "audio_diffusion"  # runs are in runs/audio_diffusion
    media = "audio"
    arguments_class = AudioDiffusionArguments
    config_class = AudioDiffusionConfig
    model_class = AudioDiffusion
    presets = AUDIO_DIFFUSION  # --config names a row
    trainer_class = AudioDiffusionTrainer  # its docstring states the loss

    def latent_settings(self):
        return latent_settings(self.cache_dir)

    @cached_property
    def vocoder(self):
        """The frozen vocoder of logged clips, None for Griffin-Lim."""
        name = f"the VAE {self.vae_checkpoint}"
        return load_matching_vocoder(self.args.vocoder_checkpoint, self.vae.config.mel, name)

    def build_config(self):
        """The preset with what the latents determine; VAE, vocoder or override that do not fit them are refused."""
        assert self.vocoder is not None or not self.args.vocoder_checkpoint
        check_conditioning(self.args, self.latents["conditioning"])
        assert self.text_encoder is not None or not self.latents["text_encoder"]
        if self.args.init_from:
            check_init_from(self.args.init_from, self.latents, self.cache_dir, media="audio")
        return fit_to_audio_latents(
            super().build_config(),
            self.latents,
            speakers=AudioLatentDataset(self.cache_dir, "train").speakers if self.args.use_speakers else [],
            vae_speakers=self.vae.config.speakers,
            overrides=self.args.override,
            folder=self.cache_dir,
        )

    def build_dataset(self, split, config):
        max_frames = self.args.max_clip_frames if split == "train" else 0
        dataset = AudioLatentPieces(self.cache_dir, split, max_frames=max_frames)
        # Training leaves out what exceeds --batch_frames; the memory of evaluation is bounded, too.
        return dataset if split == "train" else dataset.without_longer(EVALUATED_LATENTS)

    def build_collator(self, config):
        return collate_audio_latents

    def build_trainer_parts(self, model):
        if self.args.dry_run or not self.args.wer_samples:
            return {}
        dataset = self.build_dataset("validation", model.config)
        pipeline = SpeechPipeline(model, self.vae, dataset.tokenizer, self.vocoder)
        return {"measure_samples": SpokenErrorRates(pipeline, dataset, self.args)}

    def build_callbacks(self, trainer, writer):
        if not self.args.n_logged_samples:
            return []
        return [sound_callback(trainer, writer, vae=self.vae, vocoder=self.vocoder, text_encoder=self.text_encoder)]

    def count_steps(self, dataset, n_ranks):
        return count_frame_steps(dataset, self.args, n_ranks) or super().count_steps(dataset, n_ranks)

    def extra_record(self):
        if self.latents["conditioning"] == "speech":
            return {"latents": self.latents}
        entries = AudioLatentDataset(self.cache_dir, "train").entries
        return {"latents": self.latents, "clip_seconds": seconds_of_clips(entries)}

    def evaluation_flags(self):
        """Also the cache of a vocoder that the latents were made of, which holds the recordings."""
        folder = folder_of_recordings(self.latents)
        return {**super().evaluation_flags(), **({"waveforms": folder} if folder else {})}


if __name__ == "__main__":
    AudioDiffusionStage.main()
