r"""Turn audio into log-mels with their waveforms; the next stage is pretrain_vocoder.py.

    python preprocess_audio_vocoder_dataset.py --dataset_name my_speech --mel 22k --segment_seconds 10 --trim_db 40
    python preprocess_audio_vocoder_dataset.py --dataset_name my_speech --output_dir cached_datasets/augmented \
        --num_augmented_copies 2 --time_stretch --pitch_shift --gain_db

A file holds {"mel": (M, F) fp32, "waveform": (S,) fp32 in [-1, 1]} with S = F * hop_length; the manifest holds
transcripts, speakers and seconds. Augmentations given without a value take a usual one.
"""

import torch

from utils.preprocessing.audio import AudioPreprocess, log_mel
from utils.preprocessing.samples import Example


class AudioVocoderPreprocess(AudioPreprocess):
    name = "audio_vocoder"  # written to cached_datasets/audio_vocoder

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # (S,) -> (M, F), with S = F * hop_length.
        return {"mel": log_mel(example.data, self.mel), "waveform": example.data}


if __name__ == "__main__":
    AudioVocoderPreprocess.main()
