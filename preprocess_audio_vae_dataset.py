r"""Turn audio into log-mels; the next stage is pretrain_audio_vae.py.

    python preprocess_audio_vae_dataset.py --dataset_name my_speech --mel 22k --segment_seconds 10 --trim_db 40
    python preprocess_audio_vae_dataset.py --dataset_name my_speech --output_dir cached_datasets/augmented \
        --num_augmented_copies 2 --time_stretch --noise_snr_db

A file holds {"mel": (M, F) fp32}; the manifest holds transcripts, speakers and seconds. The waveforms are not kept;
a folder made by preprocess_audio_vocoder_dataset.py serves pretrain_audio_vae.py as well. Augmentations given without
a value take a usual one.
"""

from utils.command_line import check_flags
from utils.preprocessing.arguments import arguments_or_merge
from utils.preprocessing.audio_arguments import AudioPreprocessArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(AudioPreprocessArguments), __doc__)

import torch

from utils.preprocessing.audio import AudioPreprocess, log_mel
from utils.preprocessing.samples import Example


class AudioVAEPreprocess(AudioPreprocess):
    name = "audio_vae"  # written to cached_datasets/audio_vae

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # (S,) -> (M, F).
        return {"mel": log_mel(example.data, self.mel)}


if __name__ == "__main__":
    AudioVAEPreprocess.main()
