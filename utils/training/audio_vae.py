"""The audio VAE: segments of clips, losses over valid frames, characters predicted from latents, logged clips.

B batch, M mel bins, F mel frames, Z latent channels, L latent frames, V characters, T text tokens.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dataset_loading.cached import evenly_spaced
from model.audio.griffin_lim import griffin_lim
from model.audio.lengths import masked_mean
from model.audio.mel_criteria import character_loss
from model.audio.spectral import check_same_mel
from model.audio.vae import AudioVAEOutput
from model.criteria import kl_divergence
from utils.drawing.audio import latent_image, strip_sheet
from utils.drawing.images import Group
from utils.generation.audio import load_vocoder
from utils.metrics.latents import LatentHealth
from utils.training.audio import AudioCallback, ClipTrainer
from utils.training.gan import Generation, VAEGANTrainer
from utils.training.latent_statistics import sequence_moments


class SpreadMels:
    """Log-mels of clips spread over a data set, again at every iteration.

    Args:
        dataset: items with `mel` (M, F).
        n_clips: number of clips, at most all.
    """

    def __init__(self, dataset: Dataset, n_clips: int):
        self.dataset, self.n_clips = dataset, n_clips

    def __iter__(self) -> Iterator[Tensor]:
        for index in evenly_spaced(len(self.dataset), self.n_clips):
            yield self.dataset[index]["mel"]


class AudioVAEGANTrainer(ClipTrainer, VAEGANTrainer):
    """Trains an `AudioVAE` on log-mels x (B, M, F), reconstructed as x_hat.

        loss = l1_weight * |x_hat - x| + l2_weight * (x_hat - x)^2 + gradient_weight * |gradient of x_hat - x|
             + kl_weight * KL / (M F) + ctc_weight * nats per character of the transcript, given the latents
             + gan_weight(step) * adaptive_factor * (adversarial + feature_matching_weight * feature_matching)

    Every term is the mean over samples of each sample's own mean over its F valid frames; KL is a sum over its valid
    latents. Segments and noise belong to (seed, step, sample). In training a segment is padded to its full length, in
    real and generated mels alike, so that the adversary sees no difference there. `VAEGANTrainer` says which latents
    are decoded, and read by the CTC head.
    """

    crop_stream = "segment"

    def generate(self, model, inputs):
        # The segments (B, M, F) of this step, and the noise (B, Z, ..., L) of their posteriors.
        mel, n_frames = self.segments(inputs)
        shape = self.model.latent_shape(mel.shape[-1])
        # Sampled with time first: a sample's noise does not depend on how its batch is padded.
        noise = self.sample_noise(inputs, "posterior", (shape[-1], *shape[:-1])).movedim(1, -1)
        # Reconstructions, and the weighted terms of the latents.
        channel_noise, speaker = self.channel_noise(inputs), inputs.get("speaker")
        output = model(mel=mel, n_frames=n_frames, noise=noise, channel_noise=channel_noise, speaker=speaker)
        if self.running_latents is not None:
            self.running_latents.add(
                sequence_moments(output.mean, output.logvar, self.model.latents_lengths(n_frames))
            )
        terms = self.latent_terms(output, {**inputs, "mel": mel, "n_frames": n_frames})
        terms = self.weighted({name: values.mean() for name, values in terms.items()})
        return Generation(output.reconstruction, mel, terms, n_frames)

    def segments(self, inputs: dict) -> tuple[Tensor, Tensor]:
        """The part of each clip that this step trains on, and its valid frames."""
        # All segments have their full length. The discriminator needs a few frames of whole clips, too.
        args, mel = self.stage_arguments, inputs["mel"]
        missing = max(0, (args.segment_frames or 2**args.discriminator_layers) - mel.shape[-1])
        return F.pad(mel, (0, missing), value=self.model.config.mel.log_floor), inputs["n_frames"]

    def sample_terms(self, leaf, generation):
        return self.criterion(leaf, generation.target, generation.n_frames)

    def latent_terms(self, output: AudioVAEOutput, batch: dict) -> dict[str, Tensor]:
        """Loss terms of the latents, name -> (B,), to be weighted by `<name>_weight`: `kl`, nats per input value, to
        which latents in padding add nothing, and `ctc`, nats per character, where the model has such a head."""
        # KL is a sum over valid latents; divided by M * n_frames it is in nats per input value.
        terms = {"kl": kl_divergence(output.mean, output.logvar) / (batch["mel"].shape[1] * batch["n_frames"])}
        if self.stage_arguments.ctc_weight:
            lengths = self.model.latents_lengths(batch["n_frames"])  # latent frames, (B,)
            terms["ctc"] = character_loss(
                output.character_logits, lengths, batch["tokens"], token_lengths=batch["token_lengths"]
            )
        return terms

    def evaluation_terms(self, model, inputs):
        mel, n_frames = inputs["mel"], inputs["n_frames"]
        # Whole clips; without noise the posterior mean is decoded.
        output = model(mel=mel, n_frames=n_frames, speaker=inputs.get("speaker"))
        reconstruction = output.reconstruction.float().clamp_min(self.model.config.mel.log_floor)
        mel_l1 = masked_mean((reconstruction - mel).abs(), n_frames)
        terms = self.latent_terms(output, inputs)
        # The loss has the weighted terms of the latents, and no adversarial one.
        return {"mel_l1": mel_l1, **terms, "loss": sum(self.weighted(terms).values(), mel_l1)}

    def statistics_batches(self, samples):
        return list(self.whole_collator(samples)["batches"].values())

    def latent_moments(self, model, inputs):
        output = model(mel=inputs["mel"], n_frames=inputs["n_frames"], speaker=inputs.get("speaker"))
        return sequence_moments(output.mean, output.logvar, self.model.latents_lengths(inputs["n_frames"]))


class AudioReconstructionCallback(AudioCallback):
    """Logs reconstructions of validation clips. PESQ and STOI compare the vocoded reconstruction with the vocoded
    ground truth.

    sounds/<clip>_1_real, _3_generated   the vocoder, or Griffin-Lim, on the true and on the VAE's log-mel
    images/mel                     true log-mel | the VAE's | difference
    images/latents                 posterior means over time
    latents/mean_<channel>, latents/posterior_std (histograms), latents/dead_channels
    listening/pesq, stoi, mel_l1

    Args:
        vocoder_checkpoint: run or checkpoint folder of a vocoder of the same log-mel; "" for Griffin-Lim.
    Raises: ValueError, FileNotFoundError: no checkpoint of a vocoder, or one of another log-mel.
    """

    def __init__(self, trainer, writer, *, n_clips: int, vocoder_checkpoint: str = ""):
        super().__init__(trainer, writer, n_clips=n_clips)
        self.vocoder = load_vocoder(vocoder_checkpoint) if vocoder_checkpoint else None
        # A vocoder reads only log-mels of the definition that it was trained on.
        if self.vocoder is not None:
            name = f"the vocoder {vocoder_checkpoint}"
            remedy = "use a vocoder that was trained on the same log-mels"
            mel = self.vocoder.config.mel
            check_same_mel(self.settings, mel, first_name="the model", second_name=name, remedy=remedy)

    @cached_property
    def real(self) -> list[Tensor]:
        """The vocoded true log-mels."""
        return [self.vocode(sample["mel"]) for sample in self.samples]

    def run(self, model, sample, device):
        speaker = sample["speaker"][None].to(device) if "speaker" in sample else None
        mel = sample["mel"][None].to(device)  # (1, M, F)
        output = model(mel=mel, n_frames=torch.tensor([mel.shape[-1]], device=device), speaker=speaker)
        reconstruction = output.reconstruction[0].float().clamp_min(self.settings.log_floor)
        return tuple(tensor.float().cpu() for tensor in (reconstruction, output.mean, output.logvar))

    def vocode(self, mel: Tensor) -> Tensor:
        """(M, F) -> (S,) on the CPU; the log-mel of silence where it is too short, or where it is not finite."""
        log_floor, min_samples = self.settings.log_floor, self.settings.min_samples
        device = self.trainer.args.device
        # Frames up to the shortest waveform that has a log-mel.
        missing = max(0, -(-min_samples // self.settings.hop_length) - mel.shape[1])
        mel = F.pad(mel.nan_to_num(log_floor, log_floor, log_floor), (0, missing), value=log_floor)[None].to(device)
        if self.vocoder is None:
            return griffin_lim(mel, self.settings)[0].cpu()
        return self.vocoder.to(device)(mel)[0].float().cpu()

    def write(self, content, step):
        # Players, log-mels and scores of the reconstructions.
        mels = [mel for mel, _, _ in content]
        generated = [self.vocode(mel) for mel in mels]
        if self.is_first:
            self.add_sounds("real", self.real, step)
            self.is_first = False
        self.add_sounds("generated", generated, step)
        self.add_mels(mels, step)
        self.add_scores(generated, self.real, step)

        # Posteriors: means (1, Z, ..., L) as images, their histograms by channel, and channels that carry nothing.
        means, logvars = [mean for _, mean, _ in content], [logvar for _, _, logvar in content]
        longest = max(mean.shape[-1] for mean in means)
        groups = [Group([latent_image(mean[0], max_frames=longest)], name) for mean, name in zip(means, self.names)]
        self.add_image("latents", strip_sheet(groups), step)
        for channel in range(means[0].shape[1]):
            values = torch.cat([mean[0, channel].flatten() for mean in means])
            self.writer.add_histogram(f"latents/mean_{channel:02d}", values, step)
        stds = torch.cat([(0.5 * logvar).exp().flatten() for logvar in logvars])
        self.writer.add_histogram("latents/posterior_std", stds, step)
        health = LatentHealth()
        for mean, logvar in zip(means, logvars):
            health.update(mean, logvar)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
