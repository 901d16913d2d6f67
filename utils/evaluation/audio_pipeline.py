"""What the evaluations of text to speech and of captions to sound share."""

from typing import Any, ClassVar

from model.audio.diffusion import AudioDiffusion
from utils.checkpoints import resolve_checkpoint
from utils.evaluation.arguments.audio import AudioPipelineEvaluationArguments
from utils.evaluation.evaluator import Evaluator
from utils.generation.audio_diffusion import AudioPipeline
from utils.generation.exported import vocoder_of


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
