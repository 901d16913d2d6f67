r"""Audio VAE-GAN: log-mels to latents and back.

Before: preprocess_audio_vae_dataset.py, or the cache of a vocoder. After: diffusion on latents, which reads the
checkpoint by its path; a vocoder of the same log-mel makes waveforms.

    python pretrain_audio_vae.py --run_name demo --config tiny --batch_size 16 --learning_rate 2e-3 --max_steps 2000 \
        --gan_start_step 1000
    deepspeed --num_gpus=8 pretrain_audio_vae.py --use_deepspeed --bf16 --run_name base --config medium \
        --num_train_epochs 100 --batch_size 64 --learning_rate 3e-4 --deepspeed_config ds_config_zero-2.json
"""

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.conditions import DescribedAudioDataset
from model.audio.mel_criteria import MelLoss
from model.audio.mel_discriminators import build_mel_discriminator
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.presets import AUDIO_VAE
from utils.generation.audio import load_vocoder
from utils.training.adversary import Adversary
from utils.training.audio import AudioStage
from utils.training.audio_vae import AudioVAEArguments, AudioVAEGANTrainer, AudioVAEListening, SpreadMels


class AudioVAEStage(AudioStage):
    name = "audio_vae"
    arguments_class = AudioVAEArguments
    config_class = AudioVAEConfig
    model_class = AudioVAE
    presets = AUDIO_VAE
    trainer_class = AudioVAEGANTrainer
    dataset_class = AudioVAEDataset

    def build_config(self):
        """The preset with what the flags say of speakers and characters."""
        for field in ("speakers", "use_ctc"):
            if any(pair.startswith(f"{field}=") for pair in self.args.override):
                raise ValueError(f"--override {field}: it follows from --use_speakers and --ctc_weight; leave it out")
        speakers = AudioVAEDataset(self.cache_dir, "train").speakers if self.args.use_speakers else []
        if self.args.use_speakers and not speakers:
            raise ValueError(f"{self.cache_dir} names no speakers; train without --use_speakers")
        if self.args.vocoder_checkpoint:
            name = f"--vocoder_checkpoint {self.args.vocoder_checkpoint}"
            mel = load_vocoder(self.args.vocoder_checkpoint).config.mel
            AudioVAEDataset(self.cache_dir, "train").expect_mel(mel, name, "or leave --vocoder_checkpoint out")
        return super().build_config().replace(speakers=speakers, use_ctc=self.args.ctc_weight > 0)

    def build_dataset(self, split, config):
        dataset = DescribedAudioDataset(self.cache_dir, split, config.speakers, config.use_ctc)
        return dataset.expect_mel(config.mel, "the model")

    def build_trainer(self, model, datasets, training):
        if not self.args.init_from and not self.find_checkpoint():
            model.fit_to_data(SpreadMels(datasets["train"], self.args.latent_statistics_samples))
        return super().build_trainer(model, datasets, training)

    def build_trainer_parts(self, model):
        args = self.args
        parts = {"criterion": MelLoss(args.l1_weight, args.l2_weight, args.gradient_weight), "adversary": None}
        if args.gan_weight > 0:
            discriminator = build_mel_discriminator(
                args.discriminator,
                model.band_mean,
                model.band_std,
                channels=args.discriminator_channels,
                n_layers=args.discriminator_layers,
                use_spectral_norm=args.use_spectral_norm,
            )
            parts["adversary"] = Adversary(discriminator, args)
        return parts

    def build_callbacks(self, writer):
        args = self.args
        return (
            [AudioVAEListening(writer, args.n_logged_samples, args.vocoder_checkpoint)]
            if args.n_logged_samples
            else []
        )


if __name__ == "__main__":
    AudioVAEStage.main()
