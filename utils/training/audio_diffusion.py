"""Text to speech, and captions to sound: the trainer.  B batch, L latent frames, Z latent channels, T tokens."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dataset_loading.audio.latents import AudioLatentDataset
from model.audio.lengths import valid_frames
from model.audio.text_conditioning import duration_errors
from model.dropout import has_dropout
from model.layers import home_of_doubles, in_double, widen
from utils.distributed import mean_across_ranks
from utils.training.arguments.diffusion import AudioDiffusionArguments
from utils.training.budget_batches import budget_dataloader, budget_sampler, count_budget_steps
from utils.training.diffusion import DiffusionTrainer
from utils.training.latent_statistics import batches_of_rank

# Flags that act on one kind of conditioning alone, by the other one.
WITHOUT_EFFECT = {
    "caption": (
        *("sentences", "use_speakers", "max_clip_frames", "prior_weight", "duration_weight", "duration_samples"),
        "wer_samples",
    ),
    "speech": ("prompts", "text_encoder"),
}
TEXT_INPUTS = ("tokens", "n_tokens", "durations", "speakers", "languages", "caption_states", "n_caption")


class AudioDiffusionTrainer(DiffusionTrainer):
    """Trains an `AudioDiffusion` on standardised latents of clips with aligned text, or with captions.

        loss = sum over frames of loss_weight(t) * mean_z (prediction - target(x, noise, t))^2 / n_frames
             + prior_weight    * sum over frames of mean_z (prior - x)^2                       / n_frames
             + duration_weight * sum over tokens of smooth_l1(log_duration - log(1 + duration)) / n_tokens

    Captions have the first term alone. Sums are over valid frames and tokens of all micro-batches and processes of an
    optimizer step, n_frames and n_tokens their numbers: a frame has the same weight however clips are batched.

    Times, noise, dropout and dropped text belong to (seed, step, clip).
    """

    # ---- Data order.

    def get_train_dataloader(self):
        """Batches of clips of like length by a budget of frames, if there is one."""
        if not self.stage_arguments.batch_frames:
            return super().get_train_dataloader()
        dataset, args = self.train_dataset, self.stage_arguments
        sampler = budget_sampler(dataset.lengths, args.batch_frames, args, self.args.world_size)  # type: ignore[union-attr]
        return budget_dataloader(self, sampler)

    # ---- Training.

    @cached_property
    def has_dropout(self) -> bool:
        """Whether the network drops anything in training."""
        return has_dropout(self.model)

    @property
    def is_speech(self) -> bool:
        """Whether clips have tokens with durations."""
        return self.model.config.conditioning == "speech"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and the numbers of their frames and tokens per process, (2,)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # fp64 counts exactly; fp32 up to 16 million.
        total = widen(torch.zeros(2), device)
        for batch in batches:
            for place, name in enumerate(("n_latent_frames", "n_tokens")):
                if name in batch:
                    total[place] += batch[name].sum()
        return batches, mean_across_ranks(total).clamp_min(1)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro-batch.

        Args: num_items_in_batch: frames and tokens of the optimizer step / processes, (2,). Engines average gradients
            over processes, so that sums divided by these numbers become means over all frames and tokens.
        Returns: the micro-batch's part of the loss, detached.
        """
        assert isinstance(num_items_in_batch, Tensor), "the numbers of frames come from get_batch_samples"
        args, process = self.stage_arguments, self.model.process
        model.train()
        inputs = self._prepare_inputs(inputs)
        # Everything random belongs to (seed, step, clip): times (B,), dropped text (B,), noise.
        uniforms = self.sample_uniforms(inputs, "time", ())
        time = process.training_times(uniforms, args.time_sampling, mean=args.time_mean, std=args.time_std)
        drop = self.sample_uniforms(inputs, "drop", ()) < args.caption_dropout
        # Time comes first, so that a clip's noise does not depend on how far it is padded.
        noise = self.sample_noise(inputs, "noise", inputs["latents"].shape[1:])

        keys = self.dropout_keys(inputs) if self.has_dropout else None

        # Sums of this micro-batch over the numbers of the whole step.
        latents = self.draw_latents(inputs)
        sums = self.clip_sums(model, inputs, latents, noise=noise, time=time, drop=drop, dropout_keys=keys)
        n_frames, n_tokens = num_items_in_batch.float()
        weight = process.loss_weight(time, args.loss_weighting, args.min_snr_gamma)
        terms = {"mse": sums["flow"].sum() / n_frames}
        loss = (weight * sums["flow"]).sum() / n_frames
        if self.is_speech:
            terms |= {"prior": sums["prior"].sum() / n_frames, "duration": sums["duration"].sum() / n_tokens}
            loss = loss + args.prior_weight * terms["prior"] + args.duration_weight * terms["duration"]
        self.backward(loss)

        # Log lines hold means over micro-batches, and these are parts of a sum.
        n_parts = self.current_gradient_accumulation_steps
        self.record({f"loss/{name}": term * n_parts for name, term in terms.items()})
        self.record({"frames_per_step": n_frames * self.args.world_size})
        return loss.detach()

    def draw_latents(self, inputs: dict) -> Tensor:
        """Latents sampled from each posterior, (B, L, Z)."""
        if "latents_std" not in inputs:
            return inputs["latents"]
        return inputs["latents"] + inputs["latents_std"] * self.sample_noise(
            inputs, "posterior", inputs["latents"].shape[1:]
        )

    def clip_sums(
        self, model, inputs: dict, latents: Tensor, *, noise: Tensor, time: Tensor, **options: Tensor | None
    ) -> dict[str, Tensor]:
        """Errors of each clip, (B,) fp32: `flow` and for speech `prior`, squared errors summed over frames, and
        `duration`, summed over tokens.  options: `drop` and `dropout_keys` of the model's forward."""
        process, n_frames = self.model.process, inputs["n_latent_frames"]
        text = {name: inputs[name] for name in TEXT_INPUTS if name in inputs}
        if "caption_tokens" in inputs:
            text["caption_states"] = inputs["caption_tokens"]
        valid = valid_frames(n_frames, latents.shape[1])[..., None]
        latents = latents.where(valid, 0.0)
        noisy = process.add_noise(latents, noise, time)
        output = model(latents=noisy, time=time, n_latent_frames=n_frames, **options, **text)

        def frame_sum(prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction.float() - target).square().mean(2, keepdim=True).where(valid, 0.0).sum((1, 2))

        sums = {"flow": frame_sum(output.prediction, process.target(latents, noise, time))}
        if output.prior is not None:
            sums["prior"] = frame_sum(output.prior, latents)
            sums["duration"] = duration_errors(output.log_durations, inputs["durations"], inputs["n_tokens"])
            # What predictions amount to, for the ratio of lengths.
            predicted = self.model.expected_durations(output.log_durations.detach()).sum(1)
            sums["predicted_frames"] = predicted * self.model.duration_factor
        return sums

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay acts on matrices and kernels: not on norms, biases, embeddings and learned states."""
        names = set(super().get_decay_parameter_names(model))
        for module_name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                names.discard(f"{module_name}.weight")
        return [name for name, parameter in model.named_parameters() if name in names and parameter.ndim > 1]

    def rates(self, logs, steps_per_second):
        return {"frames_per_second": logs["frames_per_step"] * steps_per_second}

    # ---- Durations.

    fitted_step = -1  # The step whose duration factor the model holds.

    @torch.no_grad()
    def fit_durations(self) -> None:
        """Measure real over predicted mel frames of training clips, and store it in the model. Every process must
        call it."""
        if not self.is_speech or self.fitted_step == self.state.global_step:
            return
        evaluated = self.evaluation_model()
        model = self.accelerator.unwrap_model(evaluated)
        totals = torch.zeros(2, dtype=torch.float64, device=home_of_doubles(self.args.device))
        for samples, counts in batches_of_rank(self, self.stage_arguments.duration_samples):
            inputs = self._prepare_inputs(self.data_collator(samples))
            n_tokens, durations = inputs["n_tokens"], inputs["durations"]
            speaker = {name: inputs[name] for name in ("speakers", "languages") if name in inputs}
            text = model.encode_speech(inputs["tokens"], n_tokens, **speaker)
            predicted = model.expected_durations(text.log_durations).where(text.mask, 0.0)
            real = durations.where(text.mask, 0)
            if counts:
                totals += torch.stack([in_double(real).sum(), in_double(predicted).sum()])
        real, predicted = mean_across_ranks(totals).tolist()
        # In the trained model, which is saved, and in the copy with averaged weights.
        for holder in {self.model, model}:
            holder.set_duration_factor(real / max(predicted, 1e-3))
        self.fitted_step = self.state.global_step

    def before_saving(self):
        """Fit the duration factor, which is saved with the weights."""
        self.fit_durations()

    # ---- Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any):
        self.fit_durations()
        return super().evaluate(*args, **kwargs)

    def evaluation_terms(self, model, inputs):
        """Sums of each clip: squared errors at one time in each of K equal parts of [0, 1], by clip alone; for speech
        those of prior and durations; and the numbers of frames and tokens."""
        terms: dict[str, Tensor] = {"n_frames": inputs["n_latent_frames"].float()}
        for name, time, noise in self.evaluation_points(inputs["index"], inputs["latents"].shape[1:]):
            sums = self.clip_sums(model, inputs, inputs["latents"], noise=noise, time=time)
            terms[name] = sums.pop("flow")
        # The others do not depend on the time.
        if self.is_speech:
            real = inputs["durations"].where(valid_frames(inputs["n_tokens"], inputs["durations"].shape[1]), 0)
            terms |= {**sums, "n_tokens": inputs["n_tokens"].float(), "real_frames": real.sum(1).float()}
        return terms

    def evaluation_summary(self, terms):
        """Means over all frames and tokens of the validation set. `flow` is the mean over times, `loss` the weighted
        sum of training with equal times, `length_ratio` predicted over real mel frames."""
        args, totals = self.stage_arguments, {name: in_double(values).sum().item() for name, values in terms.items()}
        summary = {name: total / totals["n_frames"] for name, total in totals.items() if name.startswith("loss_t")}
        summary["flow"] = summary["loss"] = sum(summary.values()) / len(summary)
        if self.is_speech:
            summary |= {
                "prior": totals["prior"] / totals["n_frames"],
                "duration": totals["duration"] / totals["n_tokens"],
                "length_ratio": totals["predicted_frames"] / totals["real_frames"],
            }
            summary["loss"] += args.prior_weight * summary["prior"] + args.duration_weight * summary["duration"]
        return summary


def count_frame_steps(
    dataset: AudioLatentDataset, args: AudioDiffusionArguments, n_ranks: int
) -> tuple[int, str] | None:
    """`Stage.count_steps` with `--batch_frames`, None without."""
    if not args.batch_frames:
        return None
    return count_budget_steps(dataset.lengths, args.batch_frames, args, n_ranks)


def check_conditioning(args: AudioDiffusionArguments, conditioning: str) -> None:
    """Raises: ValueError: a flag that was given has no effect with this conditioning, or there is no prior to show."""
    given = [name for name in WITHOUT_EFFECT[conditioning] if name in getattr(args, "given", ())]
    if given:
        raise ValueError(f"--{given[0]} has no effect: these latents have conditioning={conditioning!r}")
    if conditioning == "caption" and args.n_steps == 0 and args.n_logged_samples:
        raise ValueError("--n_steps=0 shows the prior, which captions do not have; give 1 or more")
