"""Continuations of prompts by a causal model, for training, evaluation and inference.  B batch, L tokens."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dataset_loading.text_tokenizers import document_ends, load_tokenizer
from model.causal import MegaTransformerForCausalLM
from utils.checkpoints import load_model, read_stage, resolve_checkpoint
from utils.configuration import option


@dataclasses.dataclass
class GenerationArguments:
    """Flags of everything that writes text."""

    max_new_tokens: int = option(200, "most tokens per continuation; fewer where the document ends", gt=0)
    temperature: float = option(1.0, "divides the logits before tokens are drawn; 0: always the likeliest token", ge=0)
    top_k: int = option(0, "draw among so many likeliest tokens; 0: among all", ge=0)
    top_p: float = option(1.0, "draw among the likeliest tokens that have this probability together", gt=0, le=1)
    n_beams: int = option(1, "beams of a search for the likeliest continuation; 1: none", gt=0)
    seed: int = option(0, "of the drawn tokens", ge=0)
    thinking_steps: int = option(0, "recurrent models: steps per token, the most with exits; 0: the model's own", ge=0)
    exit_threshold: float = option(
        -1.0, "recurrent models: a token stops thinking below this; 0: never; -1: as the model says", ge=-1
    )

    needs = {
        "top_k": ("temperature", bool),
        "top_p": ("temperature", bool),
        "seed": ("temperature", bool),
    }

    def validate_generation(self):
        if self.n_beams > 1 and self.temperature:
            raise ValueError(f"--n_beams={self.n_beams} searches, and draws nothing: it needs --temperature 0")
        if -1 < self.exit_threshold < 0:
            raise ValueError(f"--exit_threshold={self.exit_threshold} must be -1, 0 or above")


class SeededNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the likeliest token becomes a draw from the softmax (Gumbel, 1954), with random
    numbers of its own for each row."""

    def __init__(self, n_rows: int, seed: int):
        self.generators = [torch.Generator().manual_seed(seed) for _ in range(n_rows)]

    def __call__(self, input_ids, scores):
        """(B, V) -> (B, V)."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self.generators])
        return scores - (-uniform.clamp_min(1e-38).log()).log().to(scores.device)


def drawing(settings: Any, n_rows: int) -> LogitsProcessorList:
    """What turns logits into what `temperature`, `top_k`, `top_p` and `seed` mean; nothing at temperature 0."""
    steps = LogitsProcessorList()
    if settings.temperature:
        steps.append(TemperatureLogitsWarper(float(settings.temperature)))
        steps.extend([TopKLogitsWarper(settings.top_k)] if settings.top_k else [])
        steps.extend([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else [])
        steps.append(SeededNoise(n_rows, settings.seed))
    return steps


class TextGenerator:
    """A causal model and its tokenizer, ready to continue texts.

    Args:
        model: in eval mode.
        tokenizer: the one that the model was trained with.
    """

    def __init__(self, model: MegaTransformerForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, checkpoint: str | Path, weights: Literal["ema", "raw"] = "ema", device: Any = "cpu") -> Self:
        """From a run or checkpoint folder of the multimodal stage.

        Raises:
            FileNotFoundError: nothing there, or nothing complete.
            ValueError: the checkpoint is of another stage.
        """
        folder, stage = resolve_checkpoint(checkpoint), read_stage(checkpoint)["stage"]
        if stage != "multimodal":
            raise ValueError(
                f"{checkpoint} is of stage {stage!r}; text is written by checkpoints of stage 'multimodal'"
            )
        model = load_model(MegaTransformerForCausalLM, folder, weights).requires_grad_(False).to(device)
        return cls(model, load_tokenizer(str(folder)))

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt; it begins as every document does."""
        return [document_ends(self.tokenizer)[0], *self.tokenizer.encode(prompt, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def core_keywords(self, settings: Any) -> dict[str, Any]:
        """The keywords of the recurrent core that the flags mean.

        Raises: ValueError: one of them was given for a model without a core, or an exit without a criterion.
        """
        given: dict[str, Any] = {"n_thinking_steps": settings.thinking_steps} if settings.thinking_steps else {}
        given |= {} if settings.exit_threshold < 0 else {"exit_threshold": settings.exit_threshold}
        if given and not self.model.config.n_recurrent_layers:
            flag = "--thinking_steps" if settings.thinking_steps else "--exit_threshold"
            raise ValueError(f"{flag} has no effect: the model has no recurrent core")
        if given.get("exit_threshold") and self.model.config.recurrent_exit_criterion == "none":
            raise ValueError(
                f"--exit_threshold={settings.exit_threshold}: the model has recurrent_exit_criterion='none'"
            )
        return given

    @torch.no_grad()
    def continue_tokens(
        self, prompts: Sequence[Sequence[int]], settings: Any, must_fill: bool = False
    ) -> list[list[int]]:
        """New tokens of each prompt, up to the end of the document or `max_new_tokens`.

        Prompts of different lengths are padded on the left. A continuation does not depend on what else is in the
        batch: each one draws from a stream of random numbers of its own, and all streams begin at the same seed.

        Args:
            prompts: B lists of at least one token.
            settings: a `GenerationArguments`.
            must_fill: no document ends before `max_new_tokens`.
        """
        config, longest = self.model.config, max(map(len, prompts))
        padding = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
        ids = torch.tensor([[padding] * (longest - len(each)) + list(each) for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        found = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.max_new_tokens if must_fill else None,
            num_beams=settings.n_beams,
            do_sample=False,
            pad_token_id=padding,
            logits_processor=drawing(settings, len(prompts)),
            synced_gpus=False,  # Under ZeRO-3 one process may run a whole copy, or all do the same.
            **self.core_keywords(settings),
        )
        return [self.up_to_the_end(row) for row in found[:, longest:]]

    def up_to_the_end(self, row: Tensor) -> list[int]:
        """The tokens (L,) in front of the first that ends a document."""
        ids, end = row.tolist(), self.model.config.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids

    def continue_texts(self, prompts: Sequence[str], settings: Any) -> list[str]:
        """The continuation of each prompt, without the prompt."""
        return [self.decode(ids) for ids in self.continue_tokens([self.encode(each) for each in prompts], settings)]
