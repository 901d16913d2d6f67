"""What the page says about each stage: its title, what it does, how it is made, what to do with it."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.reporting.runs import Run


@dataclasses.dataclass(frozen=True)
class View:
    """A stage as the page shows it.

    Attributes:
        stage: name of the stage and of the folder of its runs.
        title: heading.
        meaning: what the model does.
        part: of the demo, for `make demo-PART`.
        script: that trains it.
        curves: title -> name of the curve -> name of the logged number; charts without numbers are left out.
        next: what to run with a checkpoint, RUN being the run's folder and VOCODER that of a vocoder.
        is_streams: whether models of several modalities are meant, which share their stage with those of text.
        suffix: of the run's name in the demo.
    """

    stage: str
    title: str
    meaning: str
    part: str
    script: str
    curves: dict[str, dict[str, str]]
    next: Sequence[str]
    is_streams: bool = False
    suffix: str = ""

    def shows(self, run: Run) -> bool:
        """Whether a run is of this kind; one without a checkpoint is known by its name alone."""
        if run.stage != self.stage:
            return False
        if run.stage != "multimodal":
            return True
        return (
            run.is_streams == self.is_streams if run.record else bool(self.suffix) == run.folder.name.endswith("_text")
        )

    def command(self, name: str) -> str:
        """What makes this run."""
        if name in DEMO:
            return f"make demo-{self.part}"
        return f"python {self.script} --run_name {shlex.quote(name)}"

    def going_on(self, name: str) -> str:
        """How this run is completed."""
        if name in DEMO:
            return f"{self.command(name)} goes on"
        return "the command that began it goes on where it has --resume_from_checkpoint latest"

    def next_commands(self, run: Run, vocoder: Path | None) -> list[str]:
        """What to run with a run's checkpoint."""
        words = {"RUN": shlex.quote(str(run.folder)), "VOCODER": shlex.quote(str(vocoder or "runs/vocoder/base"))}
        commands = []
        for command in self.next:
            for word, value in words.items():
                command = command.replace(word, value)
            commands.append(command)
        return commands


DEMO = ("demo", "demo_text")  # names of the demo's runs
LOSS = {"Loss": {"training": "loss", "held-out": "eval_loss"}}
VIEWS = (
    View(
        "image_vae",
        "Image VAE-GAN",
        "Compresses images to latents and decodes them again. Every image that is generated below goes through it.",
        "image",
        "pretrain_image_vae.py",
        {
            "PSNR on held-out images, dB": {"held-out": "eval_psnr"},
            "L1": {"training": "loss/l1", "held-out": "eval_l1"},
        },
        ["python inference/reconstruct_image.py --checkpoint RUN --input my_images"],
    ),
    View(
        "recurrent_vae",
        "VAE with a recurrent decoder",
        "Compresses images to latents; its decoder may run for any number of steps.",
        "image",
        "pretrain_recurrent_vae.py",
        {"PSNR on held-out images, dB": {"held-out": "eval_psnr"}, **LOSS},
        ["python inference/reconstruct_image.py --checkpoint RUN --input my_images"],
    ),
    View(
        "image_diffusion",
        "Text to image",
        "Generates latents of images from captions, by diffusion.",
        "image",
        "pretrain_image_diffusion.py",
        LOSS,
        ["python inference/text_to_image.py --checkpoint RUN --prompts 'a large frog on red' 'a small house on blue'"],
    ),
    View(
        "vocoder",
        "Vocoder",
        "Makes waveforms of log-mels. Every clip that is generated below goes through it.",
        "audio",
        "pretrain_vocoder.py",
        {"Log-mel L1 on held-out clips": {"held-out": "eval_mel_l1"}, **LOSS},
        ["python inference/vocode.py --checkpoint RUN --input my_recordings"],
    ),
    View(
        "audio_vae",
        "Audio VAE-GAN",
        "Compresses log-mels to latents and decodes them again.",
        "audio",
        "pretrain_audio_vae.py",
        {"Log-mel L1": {"training": "loss/l1", "held-out": "eval_mel_l1"}},
        [
            "python inference/reconstruct_audio.py --vae_checkpoint RUN --vocoder_checkpoint VOCODER "
            "--input my_recordings"
        ],
    ),
    View(
        "audio_diffusion",
        "Text to speech",
        "Generates latents of speech from texts, by diffusion.",
        "audio",
        "pretrain_audio_diffusion.py",
        LOSS,
        [
            "python inference/text_to_speech.py --checkpoint RUN --vocoder_checkpoint VOCODER "
            "--text 'A small pig on red.'"
        ],
    ),
    View(
        "multimodal",
        "Language model",
        "Continues texts, token by token.",
        "text",
        "pretrain_multimodal.py",
        LOSS,
        ["python inference/generate_text.py --checkpoint RUN --prompts 'A list is' --n_texts 4"],
        suffix="_text",
    ),
    View(
        "multimodal",
        "Text, images and audio in one stream",
        "One transformer that draws, describes, speaks and transcribes.",
        "multimodal",
        "pretrain_multimodal.py",
        LOSS,
        [
            "python inference/chat.py --checkpoint RUN --vocoder_checkpoint VOCODER --draw 'a large frog on red' "
            "--speak 'a small house on blue'"
        ],
        is_streams=True,
    ),
)
OPTIONAL = ("recurrent_vae",)  # Not part of the demo: no section where there is no run.
