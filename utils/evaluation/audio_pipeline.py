"""What the evaluations of text to speech and of captions to sound share."""

import dataclasses
from typing import Any, ClassVar

from model.audio.diffusion import AudioDiffusion
from utils.checkpoints import resolve_checkpoint
from utils.evaluation.evaluator import ContactSheetArguments, EvaluationArguments, Evaluator, expect_values
from utils.generation.audio_diffusion import AudioPipeline, AudioSamplingArguments
from utils.generation.exported import vocoder_of
from utils.options import option

WITH_CURVE = ("curve", True)


@dataclasses.dataclass
class AudioPipelineEvaluationArguments(AudioSamplingArguments, ContactSheetArguments, EvaluationArguments):
    """Flags of the evaluation of whatever makes sounds with a diffusion model, a VAE and a vocoder."""

    batch_size: int = option(8, "clips that are generated at once", gt=0)
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run, or as recorded")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    curve: bool = option(False, "measure every combination of steps and guidance scale")
    curve_steps: list[int] = option([1, 2, 4, 8, 16, 32], "sampling steps of the curve", gt=0, only_with=WITH_CURVE)
    curve_scales: list[float] = option([1.0, 2.0], "guidance scales of the curve", ge=0, only_with=WITH_CURVE)

    def validate_curve(self):
        expect_values(self, "curve_steps", "curve_scales")


class AudioPipelineEvaluator(Evaluator):
    """Makes sounds with a pipeline of `pipeline_class`."""

    arguments_class = AudioPipelineEvaluationArguments
    model_class = AudioDiffusion
    pipeline_class: ClassVar[type[AudioPipeline]]

    def load_model(self, **options: Any):
        """The pipeline's model.

        Args: options: of `pipeline_class.text_parts`.
        """
        args = self.args
        # Paths given on the command line may be run folders.
        vocoder = vocoder_of(self.checkpoint, args.vocoder_checkpoint)
        vocoder = str(resolve_checkpoint(vocoder)) if vocoder else ""
        self.pipeline = self.pipeline_class.load(
            self.checkpoint,
            vae_checkpoint=args.vae_checkpoint,
            vocoder_checkpoint=vocoder,
            weights=self.weights,
            device=self.device,
            bf16=args.bf16,
            **options,
        )
        self.vocoder_name = vocoder or "Griffin-Lim"
        self.settings = self.pipeline.vae.config.mel
        return self.pipeline.model
