r"""Vocoder: log-mels to waveforms.

Before: preprocess_audio_vocoder_dataset.py. After: whatever writes log-mels loads the checkpoint by its path.

    python pretrain_vocoder.py --run_name demo --config tiny --batch_size 16 --max_steps 5000 \
        --gan_start_step 1000
    deepspeed --num_gpus=8 pretrain_vocoder.py --use_deepspeed --bf16 --run_name base --config medium \
        --max_steps 500000 --batch_size 32 --deepspeed_config ds_config_zero-2.json
"""

from utils.command_line import check_flags
from utils.training.arguments.vocoder import VocoderArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(VocoderArguments, __doc__)

from dataset_loading.audio.cached import VocoderDataset
from model.audio.vocoders import Vocoder, VocoderConfig
from model.audio.waveform_criteria import VocoderLoss
from model.audio.waveform_discriminators import build_waveform_discriminator
from model.presets import VOCODER
from utils.training.adversary import Adversary
from utils.training.audio import AudioStage
from utils.training.vocoder import VocoderCallback, VocoderTrainer, check_segment


class VocoderStage(AudioStage):
    name = "vocoder"  # runs are in runs/vocoder
    cache_name = "audio_vocoder"
    arguments_class = VocoderArguments
    config_class = VocoderConfig
    dataset_class = VocoderDataset
    model_class = Vocoder
    presets = VOCODER  # --config names a row
    trainer_class = VocoderTrainer  # its docstring states the loss

    def extra_record(self):
        # Which VAE's log-mels the vocoder was trained on; empty: those of recordings.
        return {"vae_fingerprint": VocoderDataset(self.cache_dir, "train").vae_fingerprint}

    def build_callbacks(self, trainer, writer):
        n_clips = self.args.n_logged_samples
        return [VocoderCallback(trainer, writer, n_clips=n_clips)] if n_clips else []

    def build_trainer_parts(self, model):
        args, mel = self.args, model.config.mel
        # Spectral losses; their longest frame needs crops of some length.
        criterion = VocoderLoss(
            mel,
            mel_weight=args.mel_weight,
            stft_weight=args.stft_weight,
            phase_weight=args.phase_weight,
            complex_stft_weight=args.complex_stft_weight,
            resolutions=args.stft_resolutions,
        )
        check_segment(args.segment_frames, mel, min_samples=criterion.min_samples, flag="--stft_resolutions")
        # --gan_weight 0: the spectral losses alone.
        if args.gan_weight == 0:
            return {"criterion": criterion}
        # The adversary, whose periods and resolutions need crops of some length too.
        discriminator = build_waveform_discriminator(
            args.discriminator,
            args.discriminator_periods,
            args.discriminator_resolutions,
            widening=args.discriminator_widening,
        )
        flags = "--discriminator_periods and --discriminator_resolutions"
        check_segment(args.segment_frames, mel, min_samples=discriminator.min_samples, flag=flags)
        return {"criterion": criterion, "adversary": Adversary(discriminator, args)}


if __name__ == "__main__":
    VocoderStage.main()
