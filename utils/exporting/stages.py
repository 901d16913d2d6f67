"""What each stage's model is, for folders that open with `from_pretrained`: class, task, and the lines that use it."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.multimodal import MegaTransformerMultimodal


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A kind of model.

    Attributes:
        model_class: opens the folder by `from_pretrained`.
        summary: one sentence for the model card.
        task: the hub's name of the task.
        command: a command that uses the folder FOLDER.
        usage: Python lines after `model`, the opened model.
    """

    model_class: type[PreTrainedModel]
    summary: str
    task: str
    command: str
    usage: str

    @property
    def auto_class(self) -> str:
        """The class of transformers that opens the folder."""
        return "AutoModelForCausalLM" if self.model_class is MegaTransformerForCausalLM else "AutoModel"

    def command_for(self, folder: str, speakers: Sequence[str] = ()) -> str:
        """The command with a folder's name.

        Args: speakers: that the model knows; the command names one.
        """
        speaker = f" --speaker {shlex.quote(speakers[0])}" if speakers else ""
        return self.command.replace("FOLDER", shlex.quote(folder)) + speaker


def image_vae(model_class: type[PreTrainedModel], decoder: str) -> ExportedModel:
    """A VAE of images."""
    return ExportedModel(
        model_class,
        f"A variational autoencoder of images{decoder}: images in [-1, 1] to latents and back.",
        "image-to-image",
        "python inference/reconstruct_image.py --checkpoint FOLDER --input my_images",
        "mean, logvar = model.encode(images)  # (B, 3, Y, X) in [-1, 1]\nreconstruction = model.decode(mean)",
    )


# Stage -> kind of model; "text" are those of the multimodal stage that know text alone, "captioned_sounds" those of
# audio_diffusion that were not trained on speech.
MODELS: dict[str, ExportedModel] = {
    "image_vae": image_vae(ImageVAE, ""),
    "recurrent_vae": image_vae(RecurrentVAE, " with a recurrent decoder"),
    "audio_vae": ExportedModel(
        AudioVAE,
        "A variational autoencoder of log-mels: log-mels to latents and back.",
        "audio-to-audio",
        "python inference/reconstruct_audio.py --vae_checkpoint FOLDER --vocoder_checkpoint my_vocoder --input audio",
        "mean, logvar = model.encode(mel)  # log-mel (B, M, F)\nreconstruction = model.decode(mean)",
    ),
    "vocoder": ExportedModel(
        Vocoder,
        "A vocoder: log-mels to waveforms.",
        "audio-to-audio",
        "python inference/vocode.py --checkpoint FOLDER --input my_audio",
        "waveform = model.synthesize(mel)  # log-mel (B, M, F) -> (B, S) in [-1, 1]",
    ),
    "image_diffusion": ExportedModel(
        ImageDiffusion,
        "A latent diffusion model: captions to latents of images, which its VAE decodes.",
        "text-to-image",
        'python inference/text_to_image.py --checkpoint FOLDER --prompts "a red house"',
        "prediction = model(latents, time).prediction  # (B, Z, y, x), times (B,) in [0, 1]",
    ),
    "audio_diffusion": ExportedModel(
        AudioDiffusion,
        "A latent diffusion model: texts to latents of audio, which its VAE and a vocoder make audible.",
        "text-to-audio",
        'python inference/text_to_speech.py --checkpoint FOLDER --text "Hello."',
        "print(model.config.describe())",
    ),
    "captioned_sounds": ExportedModel(
        AudioDiffusion,
        "A latent diffusion model: captions to latents of sounds, which its VAE and a vocoder make audible.",
        "text-to-audio",
        'python inference/text_to_audio.py --checkpoint FOLDER --prompts "rain on a roof"',
        "print(model.config.describe())",
    ),
    "multimodal": ExportedModel(
        MegaTransformerMultimodal,
        "A transformer of text, images and audio in one stream, each from any other.",
        "any-to-any",
        'python inference/chat.py --checkpoint FOLDER --prompts "a red house"',
        "print(model.config.describe())",
    ),
    "text": ExportedModel(
        MegaTransformerForCausalLM,
        "A causal language model.",
        "text-generation",
        'python inference/generate_text.py --checkpoint FOLDER --prompts "The"',
        'tokens = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=20)\n'
        "print(tokenizer.decode(tokens[0]))",
    ),
}


def kind_of(record: Mapping[str, Any], checkpoint: Path) -> str:
    """The kind of model of a checkpoint's record, a key of `MODELS`.

    Raises: ValueError: no stage that trains a model.
    """
    stage = record["stage"]
    name, latents = stage, record.get("latents") or {}
    if stage == "multimodal" and not latents:
        name = "text"
    elif stage == "audio_diffusion" and latents.get("conditioning") == "caption":
        name = "captioned_sounds"
    if name not in MODELS:
        raise ValueError(f"{checkpoint} is of stage {stage!r}, of which no model is known; known: {', '.join(MODELS)}")
    return name


def model_of(record: Mapping[str, Any], checkpoint: Path) -> ExportedModel:
    """What the model of a checkpoint's record is. Raises: ValueError: as `kind_of`."""
    return MODELS[kind_of(record, checkpoint)]
