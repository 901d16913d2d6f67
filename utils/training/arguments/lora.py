"""Flags of low-rank adapters."""

import dataclasses
from typing import ClassVar

from utils.megatransformer_utils import StageArguments
from utils.options import Section, option

WITH_ADAPTERS = ("lora_rank", bool)


@dataclasses.dataclass
class LoRAArguments(StageArguments):
    """Flags of a stage that can train low-rank adapters of a model in place of its weights."""

    SECTION_ADAPTERS: ClassVar = Section("LoRA: fine-tuning with low-rank adapters")
    lora_rank: int = option(
        0,
        "rank of the adapters (arXiv 2106.09685) that are trained in place of the weights of init_from; 0: none",
        ge=0,
    )
    lora_alpha: float | None = option(
        None, "alpha: updates are scaled by alpha / rank; default: twice the rank", gt=0, only_with=WITH_ADAPTERS
    )
    lora_modules: list[str] = option(
        [],
        "linear layers with adapters, by ends of their names such as qkv_proj or text_attention.query; default: those "
        "of attention and feed-forward networks",
        only_with=WITH_ADAPTERS,
    )

    def validate_adapters(self):
        if not self.lora_rank:
            return
        if self.use_deepspeed:
            raise ValueError(
                f"--lora_rank={self.lora_rank} with --use_deepspeed: adapters are trained without DeepSpeed; start "
                "several processes by torchrun, and leave --use_deepspeed out"
            )
        if not (self.init_from or self.resume_from_checkpoint):
            raise ValueError(
                f"--lora_rank={self.lora_rank} needs trained weights to adapt; give --init_from with a run, or leave "
                "--lora_rank out"
            )
