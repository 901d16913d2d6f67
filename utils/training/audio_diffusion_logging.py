"""Sounds and images of audio diffusion in TensorBoard.  M mel bins, F mel frames."""

import logging
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dataset_loading.cached import evenly_spaced
from utils.drawing.alignment import MARKS, aligned_mel, duration_image
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.drawing.playback import add_audio, sound_tag
from utils.generation.audio_diffusion import AudioPipeline
from utils.generation.captions import CaptionPipeline, seconds_of_clips
from utils.generation.speech import SpeechPipeline
from utils.training.callbacks import EvaluationCallback
from utils.training.trackers import add_table

logger = logging.getLogger(__name__)


class SoundCallback(EvaluationCallback):
    """Logs sounds of validation clips; subclasses say how they come about.

    Args:
        pipeline: of the frozen VAE and vocoder; its model is replaced by the present one.
        n_clips: spread evenly over the validation set.
        args: sampling flags.
    """

    before_training = False  # Noise through the VAE.

    def __init__(self, trainer, writer, *, pipeline: Any, n_clips: int, args: Any):
        super().__init__(trainer, writer)
        self.pipeline, self.n_clips, self.args = pipeline, n_clips, args
        self.is_first = True  # What does not change is written once.

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """The clips as a batch."""
        dataset = self.trainer.eval_dataset
        indices = evenly_spaced(len(dataset), self.n_clips)
        return self.trainer.data_collator([dataset[index] for index in indices])

    @cached_property
    def names(self) -> list[str]:
        """The text of each clip."""
        entries = self.trainer.eval_dataset.entries
        chosen = [entries[index] for index in evenly_spaced(len(entries), self.n_clips)]
        return [entry["caption"] or entry["key"] for entry in chosen]

    def present(self, model) -> tuple[AudioPipeline, dict[str, Tensor]]:
        """The pipeline with the present model, and the clips, on the device."""
        pipeline, device = self.pipeline, self.trainer.args.device
        pipeline.model = self.trainer.accelerator.unwrap_model(model)
        for network in (pipeline.vae, pipeline.vocoder):
            if network is not None:
                network.to(device)
        batch = {name: torch.as_tensor(value).to(device) for name, value in self.batch.items()}
        return pipeline, batch

    def add_players(self, real: list[Tensor], generated: list[Tensor], step: int) -> None:
        """Players of log-mels (M, F): real ones the first time alone."""
        rate = self.pipeline.vae.config.sample_rate
        kinds = {"real": real, "generated": generated} if self.is_first else {"generated": generated}
        if self.is_first:
            add_table(self.writer, "sounds", ("clip", "text"), enumerate(self.names))
        self.is_first = False
        for kind, mels in kinds.items():
            for number, mel in enumerate(mels):
                waveform = self.pipeline.vocode(mel)
                add_audio(self.writer, sound_tag("sounds", number, kind), waveform, rate=rate, step=step)


class SpeechCallback(SoundCallback):
    """Logs what the model speaks: validation clips with predicted durations, and sentences.

    images/mel                   decoded real latents | generated, both with the boundaries of their tokens
    images/durations             predicted against real durations of tokens
    sounds/<clip>_1_real, _3_generated, sounds/sentence_<number>

    Args:
        sentences: further texts that are spoken by the first speaker.
        pipeline, n_clips, args: see `SoundCallback`.
    """

    pipeline: SpeechPipeline

    def __init__(self, trainer, writer, *, sentences: list[str], **settings: Any):
        super().__init__(trainer, writer, **settings)
        self.sentences = [sentence for text in sentences for sentence in self.pipeline.speakable(text)]

    def compute(self, model):
        pipeline, batch = self.present(model)
        inputs = {name: batch[name] for name in ("tokens", "n_tokens", "speakers", "languages") if name in batch}
        # The same seeds at every step: only the model changes.
        seeds, config = list(range(len(self.names))), pipeline.model.config
        speakers = [config.speakers[place] for place in batch["speakers"].tolist()] if config.speakers else []
        first = {"speaker": next(iter(config.speakers), "")}
        try:
            latents, durations = pipeline.latents(inputs, seeds, self.args)
            generated = pipeline.decode(latents, durations.sum(1), speakers)
            sentences = [waveform for _, waveform in pipeline.speak(self.sentences, self.args, **first)]
        except ValueError as error:  # Log-mels are not finite; those of later steps may be.
            logger.warning("nothing is spoken at step %d: %s", self.trainer.state.global_step, error)
            return None
        # Real latents through the same decoder.
        real = pipeline.decode(batch["latents"], batch["durations"].sum(1), speakers)
        return {"real": real, "generated": generated, "durations": durations.cpu(), "sentences": sentences}

    def write(self, content, step):
        n_tokens, durations = self.batch["n_tokens"].tolist(), self.batch["durations"]
        clips = list(zip(content["real"], content["generated"], durations, content["durations"], n_tokens))
        # Log-mels with the boundaries of tokens, in one time scale.
        longest = max(mel.shape[1] for real, generated, *_ in clips for mel in (real, generated))
        groups, settings = [], self.pipeline.vae.config.mel
        for name, (real, generated, true, predicted, n) in zip(self.names, clips):
            pairs = ((real, true[:n]), (generated, predicted[:n]))
            groups.append(Group([aligned_mel(*pair, settings, max_frames=longest) for pair in pairs], name))
        seconds = longest * settings.hop_length / settings.sample_rate
        title = f"log-mels, the longest {seconds:.1f} s; {MARKS}"
        labels = ("real latents, decoded", "generated, predicted durations")
        self.add_image("mel", strip_sheet(groups, labels, title=title), step)
        pairs = [(true[:n], predicted[:n]) for _, _, true, predicted, n in clips]
        real, predicted = (torch.cat(side) for side in zip(*pairs))
        self.add_image("durations", duration_image(real, predicted), step)
        # Players.
        self.add_players(content["real"], content["generated"], step)
        rate = self.pipeline.vae.config.sample_rate
        for number, waveform in enumerate(content["sentences"]):
            add_audio(self.writer, f"sounds/sentence_{number:02d}", waveform, rate=rate, step=step)


class CaptionCallback(SoundCallback):
    """Logs what the model makes of captions: validation clips at their true lengths, and prompts at the median length.

    images/mel                   decoded real latents | generated
    sounds/<clip>_1_real, _3_generated, sounds/prompt_<number>

    Args:
        prompts: further captions.
        pipeline, n_clips, args: see `SoundCallback`.
    """

    pipeline: CaptionPipeline

    def __init__(self, trainer, writer, *, prompts: list[str], **settings: Any):
        super().__init__(trainer, writer, **settings)
        self.pipeline.check_captions(prompts)
        self.prompts = prompts

    def compute(self, model):
        pipeline, batch = self.present(model)
        states = batch["caption_states" if "caption_states" in batch else "caption_tokens"]
        inputs = {"caption_states": states, "n_caption": batch["n_caption"]}
        # The same seeds at every step: only the model changes.
        seeds, n_frames = list(range(len(self.names))), batch["n_mel_frames"]
        try:
            generated = pipeline.decode(pipeline.latents(inputs, n_frames, seeds, self.args), n_frames)
            sounds = pipeline.sounds(self.prompts, [0] * len(self.prompts), self.args)
            prompts = [waveform for *_, waveform in sounds]
        except ValueError as error:  # Log-mels are not finite; those of later steps may be.
            logger.warning("no sounds of captions at step %d: %s", self.trainer.state.global_step, error)
            return None
        real = pipeline.decode(batch["latents"], n_frames)
        return {"real": real, "generated": generated, "prompts": prompts}

    def write(self, content, step):
        # Log-mels in one time scale.
        pairs = list(zip(content["real"], content["generated"], strict=True))
        longest, settings = max(real.shape[1] for real, _ in pairs), self.pipeline.vae.config.mel
        nothing = torch.zeros(0, dtype=torch.long)
        groups = [
            Group([aligned_mel(mel, nothing, settings, max_frames=longest) for mel in pair], name)
            for name, pair in zip(self.names, pairs)
        ]
        self.add_image("mel", strip_sheet(groups, ("real latents, decoded", "generated")), step)
        self.add_players(content["real"], content["generated"], step)
        rate = self.pipeline.vae.config.sample_rate
        for number, waveform in enumerate(content["prompts"]):
            add_audio(self.writer, f"sounds/prompt_{number:02d}", waveform, rate=rate, step=step)


def sound_callback(trainer: Any, writer: Any, *, vae: Any, vocoder: Any, text_encoder: Any) -> SoundCallback:
    """What shows the sounds of a run in TensorBoard; the networks are frozen."""
    args, dataset = trainer.stage_arguments, trainer.train_dataset
    settings = {"n_clips": args.n_logged_samples, "args": args}
    if trainer.is_speech:
        speech = SpeechPipeline(trainer.model, vae, dataset.tokenizer, vocoder)
        return SpeechCallback(trainer, writer, pipeline=speech, sentences=args.sentences, **settings)
    lengths = seconds_of_clips(dataset.entries)
    sounds = CaptionPipeline(trainer.model, vae, vocoder, clip_seconds=lengths, text_encoder=text_encoder)
    return CaptionCallback(trainer, writer, pipeline=sounds, prompts=args.prompts, **settings)
