"""Flags of scripts that generate text."""

import dataclasses
from typing import ClassVar

from utils.flags.choices import WeightsKind
from utils.options import Section, option


@dataclasses.dataclass
class GenerationArguments:
    """Flags of everything that generates text."""

    SECTION_SAMPLING: ClassVar = Section("Sampling")
    max_new_tokens: int = option(200, "maximum number of tokens per continuation; fewer where the document ends", gt=0)
    temperature: float = option(1.0, "divisor of the logits in sampling; 0: greedy", ge=0)
    top_k: int = option(0, "sample from the k most likely tokens; 0: from all", ge=0, only_with=("temperature", bool))
    top_p: float = option(
        1.0,
        "sample from the most likely tokens whose probabilities sum to p (nucleus sampling)",
        gt=0,
        le=1,
        only_with=("temperature", bool),
    )
    n_beams: int = option(1, "number of beams of beam search; 1: none", gt=0)
    seed: int = option(0, "seed of sampling", ge=0, lt=2**63, only_with=("temperature", bool))
    thinking_steps: int = option(
        0, "recurrent models: thinking steps per token, the maximum with exits; 0: the model's own", ge=0
    )
    exit_threshold: float = option(
        -1.0, "recurrent models: threshold of an early exit; 0: no exits; -1: the model's own", ge=-1
    )

    def validate_generation(self):
        if self.n_beams > 1 and self.temperature:
            raise ValueError(f"--n_beams={self.n_beams} is a search without sampling: it needs --temperature 0")
        if -1 < self.exit_threshold < 0:
            raise ValueError(f"--exit_threshold={self.exit_threshold} must be -1, 0 or above")


@dataclasses.dataclass
class GenerateTextArguments(GenerationArguments):
    """Flags of `inference/generate_text.py`."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    SECTION_PROMPTS: ClassVar = Section("Prompts")
    prompts: list[str] = option([], "texts to continue")
    prompt_file: str = option("", "further texts, one per line")
    n_texts: int = option(
        1, "sampled continuations per prompt, each with its own seed", gt=0, only_with=("temperature", bool)
    )
    batch_size: int = option(16, "texts per batch", gt=0)
    SECTION_OUTPUT: ClassVar = Section("Output")
    output_dir: str = option("inference/generated/text", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.prompts or self.prompt_file):
            raise ValueError(
                "--checkpoint and --prompts or --prompt_file are needed: a run folder, and texts to continue"
            )
