"""The vocoder: random crops, losses on waveforms, evaluation on whole clips, logged clips.

B batch, M mel bins, F frames, S samples.
"""

import statistics

import torch.nn.functional as F
from torch import Tensor

from model.audio.griffin_lim import griffin_lim
from model.audio.lengths import valid_frames
from model.audio.spectral import LogMel, MelSettings
from utils.drawing.audio import phase_image, waveform_image
from utils.metrics.timing import Stopwatch
from utils.training.audio import AudioCallback, ClipTrainer
from utils.training.gan import GANTrainer, Generation


def check_segment(segment_frames: int, mel: MelSettings, *, min_samples: int, flag: str) -> None:
    """Check the length of training crops.

    Args:
        min_samples: what a loss or a discriminator needs.
        flag: the one that determines it, for the remedy.
    Raises: ValueError: training crops are shorter.
    """
    # The needed frames are rounded up.
    n_samples, n_needed = segment_frames * mel.hop_length, -(-min_samples // mel.hop_length)
    if n_samples < min_samples:
        raise ValueError(
            f"--segment_frames={segment_frames} makes crops of {n_samples} samples, and {min_samples} are needed: "
            f"give --segment_frames {n_needed}, or shorter {flag}"
        )


def pad_crops(
    mel: Tensor, waveform: Tensor, *, segment_frames: int, hop_length: int, log_floor: float
) -> tuple[Tensor, Tensor]:
    """Crops with silence after those that are shorter than a segment.

    Args:
        mel: (B, M, F) with F <= segment_frames.
        waveform: (B, F * hop_length).
        log_floor: the log-mel of silence.
    Returns: (B, M, segment_frames), (B, segment_frames * hop_length).
    """
    missing = segment_frames - mel.shape[-1]
    return F.pad(mel, (0, missing), value=log_floor), F.pad(waveform, (0, missing * hop_length))


class VocoderTrainer(ClipTrainer, GANTrainer):
    """Trains a vocoder from log-mels to waveforms x_hat, compared with recordings x.

        loss = mel_weight * |mel(x_hat) - mel(x)|
             + stft_weight * (spectral convergence + |log-magnitudes|), means over `--stft_resolutions`
             + phase_weight * (group delay + instantaneous frequency)
             + complex_stft_weight * |complex spectrograms| / |that of x|
             + gan_weight(step) * adaptive_factor * (adversarial + feature_matching_weight * feature_matching)

    A step takes crops of `segment_frames` frames at places that belong to (seed, step, sample); evaluation takes whole
    clips. `criterion` is a `VocoderLoss`.
    """

    crop_stream = "crop"

    def generate(self, model, inputs):
        # (B, M, segment_frames) and (B, segment_frames * hop_length).
        mel, target = pad_crops(
            inputs["mel"],
            inputs["waveform"],
            segment_frames=self.stage_arguments.segment_frames,
            hop_length=self.model.config.hop_length,
            log_floor=self.model.config.mel.log_floor,
        )
        return Generation(model(mel=mel), target)

    def evaluation_terms(self, model, inputs):
        """The loss's distances on whole clips, unweighted, and `loss`, their weighted sum. Padding does not count: a
        clip's numbers do not depend on the rest of the batch."""
        mel, target, hop_length = inputs["mel"], inputs["waveform"], self.model.config.hop_length
        # Silence after every clip, so that the longest one of a batch ends as the others do.
        n_extra = self.model.generator.context_frames + -(-self.criterion.min_samples // hop_length)
        mel = F.pad(mel, (0, n_extra), value=self.model.config.mel.log_floor)
        n_samples = inputs["n_frames"] * hop_length  # (B,)
        generated = model(mel=mel).float()
        valid = valid_frames(n_samples, generated.shape[1])  # (B, S)
        target = F.pad(target, (0, n_extra * hop_length))

        # Distances per clip, (B,), over its valid samples.
        terms = self.criterion.distances(generated * valid, target, n_samples)
        loss = sum(self.criterion.weights[name] * values for name, values in terms.items())
        return {**{("mel_l1" if name == "mel" else name): values for name, values in terms.items()}, "loss": loss}


class VocoderCallback(AudioCallback):
    """Logs waveforms that a vocoder generates from the log-mels of validation clips.

    sounds/<clip>_1_real, _2_griffin_lim, _3_generated   players; all but the generated ones once
    images/mel                     log-mel of the recording | of the generated waveform | difference
    images/waveform                both waveforms of the first clip
    images/phase                   errors of its phases and of their change
    listening/pesq, stoi, mel_l1, phase_error, frequency_error, real_time_factor (the first clip left out)
    """

    def run(self, model, sample, device):
        # The watch waits for the device, so that the computation is timed.
        watch = Stopwatch(device)
        start = watch.now()
        waveform = model(mel=sample["mel"][None].to(device))[0].float()
        return waveform.cpu(), watch.now() - start

    def write(self, content, step):
        generated, times = [waveform for waveform, _ in content], [time for _, time in content]
        real = [sample["waveform"] for sample in self.samples]
        rate, n_fft, hop_length = self.settings.sample_rate, self.settings.n_fft, self.settings.hop_length
        # Players and log-mels.
        if self.is_first:
            self.add_sounds("real", real, step)
            # What the log-mels give without a vocoder.
            baselines = [griffin_lim(sample["mel"][None], self.settings)[0] for sample in self.samples]
            self.add_sounds("griffin_lim", baselines, step)
            self.is_first = False
        self.add_sounds("generated", generated, step)
        log_mel = LogMel(self.settings)
        self.add_mels([log_mel(waveform[None])[0] for waveform in generated], step)

        # Waveforms and phases of the first clip; scores of all.
        self.add_image("waveform", waveform_image({"real": real[0], "generated": generated[0]}, rate), step)
        phases = [phase_image(*pair, n_fft=n_fft, hop_length=hop_length) for pair in zip(generated, real)]
        self.add_image("phase", phases[0][0], step)
        for name in ("phase", "frequency"):
            mean = statistics.fmean(errors[name] for _, errors in phases)
            self.writer.add_scalar(f"listening/{name}_error", mean, step)
        self.add_scores(generated, real, step)

        # Seconds of computation per second of audio; the first clip pays for what happens once.
        counted = slice(min(1, len(times) - 1), None)
        factor = sum(times[counted]) / sum(len(waveform) / rate for waveform in generated[counted])
        self.writer.add_scalar("listening/real_time_factor", factor, step)
