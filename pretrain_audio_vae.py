r"""Audio VAE-GAN: log-mels to latents and back.

Before: preprocess_audio_vae_dataset.py, or the cache of a vocoder. After: diffusion on latents, which reads the
checkpoint by its path; a vocoder of the same log-mel makes waveforms.

    python pretrain_audio_vae.py --run_name demo --config tiny --batch_size 16 --learning_rate 2e-3 --max_steps 2000 \
        --gan_start_step 1000
    deepspeed --num_gpus=8 pretrain_audio_vae.py --use_deepspeed --bf16 --run_name base --config medium \
        --num_train_epochs 100 --batch_size 64 --learning_rate 3e-4 --deepspeed_config ds_config_zero-2.json
"""

from utils.command_line import check_flags
from utils.training.arguments.audio_vae import AudioVAEArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(AudioVAEArguments, __doc__)

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.conditions import DescribedAudioDataset
from model.audio.mel_criteria import MelLoss
from model.audio.mel_discriminators import build_mel_discriminator
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.presets import AUDIO_VAE
from utils.generation.audio import load_vocoder
from utils.training.adversary import Adversary
from utils.training.audio import AudioStage
from utils.training.audio_vae import AudioReconstructionCallback, AudioVAEGANTrainer, SpreadMels


class AudioVAEStage(AudioStage):
    name = "audio_vae"  # runs are in runs/audio_vae
    arguments_class = AudioVAEArguments
    config_class = AudioVAEConfig
    model_class = AudioVAE
    presets = AUDIO_VAE  # --config names a row
    trainer_class = AudioVAEGANTrainer  # its docstring states the loss
    dataset_class = AudioVAEDataset

    def build_config(self):
        """The preset with what the flags say of speakers and characters."""
        # Two fields follow from flags and data, and cannot be overridden.
        for field in ("speakers", "use_ctc"):
            if any(pair.startswith(f"{field}=") for pair in self.args.override):
                raise ValueError(f"--override {field}: it follows from --use_speakers and --ctc_weight; leave it out")
        # The speakers of the training set, in the order of their indices.
        speakers = AudioVAEDataset(self.cache_dir, "train").speakers if self.args.use_speakers else []
        if self.args.use_speakers and not speakers:
            raise ValueError(f"{self.cache_dir} names no speakers; train without --use_speakers")
        # The vocoder of the logged clips must read the log-mel of the cache.
        if self.args.vocoder_checkpoint:
            name = f"--vocoder_checkpoint {self.args.vocoder_checkpoint}"
            mel = load_vocoder(self.args.vocoder_checkpoint).config.mel
            AudioVAEDataset(self.cache_dir, "train").expect_mel(mel, name, "or leave --vocoder_checkpoint out")
        return super().build_config().replace(speakers=speakers, use_ctc=self.args.ctc_weight > 0)

    def build_dataset(self, split, config):
        dataset = DescribedAudioDataset(self.cache_dir, split, config.speakers, use_tokens=config.use_ctc)
        return dataset.expect_mel(config.mel, "the model")

    def build_model(self, config):
        """A new model starts from the mel bins' statistics and the principal components of the training set."""
        model = super().build_model(config)
        # Loaded weights bring their statistics along.
        if not self.args.init_from and not self.find_checkpoint():
            dataset = self.build_dataset("train", config)
            model.fit_to_data(SpreadMels(dataset, self.args.latent_statistics_samples))
        return model

    def build_trainer_parts(self, model):
        args = self.args
        # Losses on log-mels, and an adversary that gets the statistics of their bins.
        criterion = MelLoss(l1_weight=args.l1_weight, l2_weight=args.l2_weight, gradient_weight=args.gradient_weight)
        if args.gan_weight == 0:
            return {"criterion": criterion}
        discriminator = build_mel_discriminator(
            args.discriminator,
            model.band_mean,
            model.band_std,
            channels=args.discriminator_channels,
            n_layers=args.discriminator_layers,
            use_spectral_norm=args.use_spectral_norm,
        )
        return {"criterion": criterion, "adversary": Adversary(discriminator, args)}

    def build_callbacks(self, trainer, writer):
        if not self.args.n_logged_samples:
            return []
        settings = {"n_clips": self.args.n_logged_samples, "vocoder_checkpoint": self.args.vocoder_checkpoint}
        return [AudioReconstructionCallback(trainer, writer, **settings)]


if __name__ == "__main__":
    AudioVAEStage.main()
