"""The audio VAE: flags, segments of clips, losses over valid frames, characters read out of latents, clips to hear.

B batch, M mel bins, F mel frames, Z latent channels, L latent frames, V characters, T text tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from model.audio.griffin_lim import griffin_lim
from model.audio.lengths import crop_starts, masked_mean, valid_frames
from model.audio.mel_criteria import character_loss
from model.audio.spectral import check_same_mel
from model.audio.vae import AudioVAEOutput
from model.criteria import kl_divergence
from utils.distributed import mean_across_ranks, rank, world_size
from utils.drawing.audio import latent_image, strip_sheet
from utils.drawing.images import Group
from utils.generation.audio import load_vocoder
from utils.megatransformer_utils import StageArguments
from utils.metrics.latents import LatentHealth
from utils.options import option
from utils.training.adversary import AdversaryArguments, adversary_needs
from utils.training.audio import Listening
from utils.training.gan import GANTrainer


@dataclasses.dataclass
class AudioVAEArguments(AdversaryArguments, StageArguments):
    """Flags of the audio VAE-GAN stage."""

    segment_frames: int = option(128, "mel frames of a clip per step, at a random place; 0: whole clips", ge=0)
    use_speakers: bool = option(False, "tell the model who speaks")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", gt=0)

    # Losses.
    l1_weight: float = option(1.0, "weight of the mean absolute error of log-mels", ge=0)
    l2_weight: float = option(0.0, "weight of their mean squared error", ge=0)
    gradient_weight: float = option(0.0, "weight of the error's differences along time and frequency", ge=0)
    kl_weight: float = option(1e-2, "weight of the KL divergence in nats per input value", ge=0)
    ctc_weight: float = option(
        0.0, "weight of reading the transcript out of the latents, in nats per character; 0: no such head", ge=0
    )

    # The adversary.
    discriminator: Literal["patch_1d", "patch_2d"] = option("patch_2d", "kind of discriminator")
    discriminator_channels: int = option(32, "channels of the discriminator's first layer", gt=0)
    discriminator_layers: int = option(3, "strided layers of the discriminator", gt=0)
    use_spectral_norm: bool = option(False, "spectral normalisation of the discriminator")

    # What is measured and heard.
    latent_statistics_samples: int = option(
        1024, "training clips that means and deviations of mel bins and latents are measured on", gt=0
    )
    n_logged_samples: int = option(4, "validation clips to hear and see in TensorBoard; 0: none", ge=0)
    vocoder_checkpoint: str = option(
        "", "run or checkpoint folder of a vocoder that they are heard by; default: Griffin-Lim"
    )

    needs = {
        "vocoder_checkpoint": ("n_logged_samples", bool),
        **adversary_needs("discriminator", "discriminator_channels", "discriminator_layers", "use_spectral_norm"),
    }

    def validate_segments(self):
        if self.ctc_weight > 0 and self.segment_frames:
            raise ValueError(
                f"--ctc_weight={self.ctc_weight} needs --segment_frames=0: a transcript is that of a whole clip"
            )
        if self.gan_weight > 0 and 0 < self.segment_frames < 2**self.discriminator_layers:
            raise ValueError(
                f"--segment_frames={self.segment_frames} are too few for --discriminator_layers="
                f"{self.discriminator_layers}, which needs {2**self.discriminator_layers}"
            )


class SpreadMels:
    """Log-mels of clips spread over a data set, again at every iteration.

    Args:
        dataset: items with `mel` (M, F).
        n_clips: how many, at most all.
    """

    def __init__(self, dataset: Dataset, n_clips: int):
        self.dataset, self.n_clips = dataset, min(n_clips, len(dataset))

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.n_clips):
            yield self.dataset[i * len(self.dataset) // self.n_clips]["mel"]


def crop_segments(mel: Tensor, n_frames: Tensor, uniforms: Tensor, length: int, log_floor: float):
    """One segment of each clip.

    Args:
        mel: (B, M, F).
        n_frames: valid frames, (B,).
        uniforms: in [0, 1), (B,): where a segment starts, of all places that fit.
        length: frames of the segments; a shorter clip is taken whole and padded with `log_floor`.
    Returns: segments (B, M, length) and their valid frames (B,).
    """
    places = crop_starts(n_frames, length, uniforms)[:, None] + torch.arange(length, device=mel.device)
    valid = places < n_frames[:, None]
    places = places.clamp_max(mel.shape[-1] - 1)[:, None].expand(-1, mel.shape[1], -1)
    return mel.gather(-1, places).where(valid[:, None], log_floor), n_frames.clamp_max(length)


class AudioVAEGANTrainer(GANTrainer):
    """Trains an `AudioVAE`: distances of log-mels over valid frames, KL, an adversary on mels, and characters.

    Segments and noise belong to (seed, step, sample). Losses are means of each sample's own mean. The KL term is
    `kl_weight` x nats per input value: a sample's nats over its valid latents, over M x its valid frames. In training
    a segment is padded to its full length, in real and generated mels alike, so that the adversary sees no difference
    there.
    """

    def generate(self, model, inputs):
        mel, n_frames = self.segments(inputs)
        inputs.update(mel=mel, n_frames=n_frames)
        shape = self.model.latent_shape(mel.shape[-1])
        # Drawn with time first: a sample's noise does not depend on how its batch is padded.
        noise = self.sample_noise(inputs, "posterior", (shape[-1], *shape[:-1])).movedim(1, -1)
        output = model(mel=mel, n_frames=n_frames, noise=noise, speaker=inputs.get("speaker"))
        return output.reconstruction, mel, (output, inputs)

    def segments(self, inputs: dict) -> tuple[Tensor, Tensor]:
        """The part of each clip that this step trains on, and its valid frames."""
        args, mel, n_frames = self.stage_arguments, inputs["mel"], inputs["n_frames"]
        log_floor = self.model.config.mel.log_floor
        if not args.segment_frames:
            # The discriminator needs a few frames, which a batch of short clips may not have.
            return F.pad(mel, (0, max(0, 2**args.discriminator_layers - mel.shape[-1])), value=log_floor), n_frames
        uniforms = self.sample_uniforms(inputs, "segment", ())
        return crop_segments(mel, n_frames, uniforms, args.segment_frames, log_floor)

    def leaf_terms(self, leaf, real, inputs):
        return self.criterion(leaf, real, inputs["n_frames"])

    def other_terms(self, output, real):
        output, inputs = output
        args = self.stage_arguments
        terms = {"kl": args.kl_weight * self.kl_per_value(output, inputs).mean()}
        if args.ctc_weight:
            terms["ctc"] = args.ctc_weight * self.character_losses(output, inputs).mean()
        return terms

    def kl_per_value(self, output: AudioVAEOutput, inputs: dict) -> Tensor:
        """Nats per input value, (B,); latents in padding have none."""
        return kl_divergence(output.mean, output.logvar) / (inputs["mel"].shape[1] * inputs["n_frames"])

    def character_losses(self, output: AudioVAEOutput, inputs: dict) -> Tensor:
        """`character_loss` of each sample, (B,)."""
        lengths = self.model.latents_lengths(inputs["n_frames"])
        return character_loss(output.character_logits, lengths, inputs["tokens"], inputs["token_lengths"])

    def evaluation_terms(self, model, inputs):
        mel, n_frames, args = inputs["mel"], inputs["n_frames"], self.stage_arguments
        output = model(mel=mel, n_frames=n_frames, speaker=inputs.get("speaker"))
        reconstruction = output.reconstruction.float().clamp_min(self.model.config.mel.log_floor)
        terms = {
            "mel_l1": masked_mean((reconstruction - mel).abs(), n_frames),
            "kl": self.kl_per_value(output, inputs),
        }
        loss = terms["mel_l1"] + args.kl_weight * terms["kl"]
        if args.ctc_weight:
            terms["ctc"] = self.character_losses(output, inputs)
            loss = loss + args.ctc_weight * terms["ctc"]
        return {**terms, "loss": loss}

    @torch.no_grad()
    def before_saving(self):
        """Measure the latents' mean and standard deviation per channel over valid frames of the training set, the
        posterior's variance included, for the next stage."""
        model = self.evaluation_model()
        moments = torch.zeros(3, self.model.config.latent_channels, dtype=torch.float64, device=self.args.device)
        for batch, counts in self.statistics_batches():
            inputs = self._prepare_inputs(self.data_collator(batch))
            output = model(mel=inputs["mel"], n_frames=inputs["n_frames"], speaker=inputs.get("speaker"))
            if not counts:
                continue
            mean, second = output.mean.double(), output.mean.double().square() + output.logvar.double().exp()
            lengths = self.model.latents_lengths(inputs["n_frames"])
            valid = valid_frames(lengths, mean.shape[-1])
            valid = valid.view(len(mean), *[1] * (mean.ndim - 2), -1).expand_as(mean).double()
            parts = ((values * valid).transpose(0, 1).flatten(1).sum(1) for values in (mean, second, valid))
            moments += torch.stack([*parts])
        total = mean_across_ranks(moments)
        mean = total[0] / total[2]
        std = (total[1] / total[2] - mean.square()).clamp_min(1e-12).sqrt()
        self.model.set_latent_statistics(mean.float(), std.float())

    def statistics_batches(self):
        """Batches of samples, spread over the whole training set, and whether they count: every process runs the same
        number of forwards, as sharded weights need."""
        n_all, batch_size = len(self.train_dataset), self.args.per_device_eval_batch_size
        n_samples = min(self.stage_arguments.latent_statistics_samples, n_all)
        for start in range(rank() * batch_size, n_samples + rank() * batch_size, batch_size * world_size()):
            places = range(start, min(start + batch_size, n_samples))
            yield [self.train_dataset[i * n_all // n_samples] for i in places] or [self.train_dataset[0]], len(places)


class AudioVAEListening(Listening):
    """What an audio VAE makes of validation clips; PESQ and STOI hold the resynthesis of its log-mels against that of
    the true ones.

    sounds/<clip>_real, _generated   the vocoder, or Griffin-Lim, on the true and on the VAE's log-mel
    images/mel                     true log-mel | the VAE's | difference
    images/latents                 posterior means over time
    latents/mean_<channel>, latents/posterior_std (histograms), latents/dead_channels
    listening/pesq, stoi, mel_l1

    Args:
        vocoder_checkpoint: run or checkpoint folder of a vocoder of the same log-mel; "" for Griffin-Lim.
    Raises: ValueError, FileNotFoundError: no checkpoint of a vocoder; when training begins: one of another log-mel.
    """

    def __init__(self, writer: SummaryWriter | None, n_clips: int, vocoder_checkpoint: str = ""):
        super().__init__(writer, n_clips)
        self.vocoder_checkpoint = vocoder_checkpoint
        self.vocoder = load_vocoder(vocoder_checkpoint) if vocoder_checkpoint else None
        self.real: list[Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.vocoder is not None:
            name = f"the vocoder {self.vocoder_checkpoint}"
            remedy = "use a vocoder that was trained on the same log-mels"
            check_same_mel(self.settings, "the model", self.vocoder.config.mel, name, remedy)
        super().on_train_begin(args, state, control, **kwargs)

    def run(self, model, sample, device):
        speaker = sample["speaker"][None].to(device) if "speaker" in sample else None
        mel = sample["mel"][None].to(device)
        output = model(mel=mel, n_frames=torch.tensor([mel.shape[-1]], device=device), speaker=speaker)
        reconstruction = output.reconstruction[0].float().clamp_min(self.settings.log_floor)
        return tuple(each.float().cpu() for each in (reconstruction, output.mean, output.logvar))

    def vocode(self, mel: Tensor, device: torch.device) -> Tensor:
        """(M, F) -> (S,) on the CPU; the log-mel of silence where it is too short, or where it is not finite."""
        log_floor, min_samples = self.settings.log_floor, self.settings.min_samples
        missing = max(0, -(-min_samples // self.settings.hop_length) - mel.shape[1])
        mel = torch.nn.functional.pad(mel.nan_to_num(log_floor, log_floor, log_floor), (0, missing), value=log_floor)
        mel = mel[None].to(device)
        if self.vocoder is None:
            return griffin_lim(mel, self.settings)[0].cpu()
        return self.vocoder.to(device)(mel)[0].float().cpu()

    def write(self, made, device, step, is_first):
        mels, health = [mel for mel, _, _ in made], LatentHealth()
        if is_first:
            self.real = [self.vocode(sample["mel"], device) for sample in self.samples]
            self.add_sounds("real", self.real, step)
        generated = [self.vocode(mel, device) for mel in mels]
        self.add_sounds("generated", generated, step)
        self.add_mels(mels, step)
        self.add_scores(self.real, generated, step)
        longest = max(mean.shape[-1] for _, mean, _ in made)
        groups = [
            Group([latent_image(mean[0], max_frames=longest)], name) for (_, mean, _), name in zip(made, self.names)
        ]
        self.add_image("latents", strip_sheet(groups), step)
        for _, mean, logvar in made:
            health.update(mean, logvar)
        for channel in range(made[0][1].shape[1]):
            values = torch.cat([mean[0, channel].flatten() for _, mean, _ in made])
            self.writer.add_histogram(f"latents/mean_{channel:02d}", values, step)
        deviations = torch.cat([(0.5 * logvar).exp().flatten() for _, _, logvar in made])
        self.writer.add_histogram("latents/posterior_std", deviations, step)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
