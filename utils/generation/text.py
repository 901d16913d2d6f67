"""Generation of text by a causal model, for training, evaluation and inference.  B batch, L tokens, V vocabulary."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from dataset_loading.cached import evenly_spaced
from dataset_loading.text.tokenizers import (
    document_encoder,
    document_ends,
    load_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from utils.checkpoints import COMPLETE, check_files, explained_loading, load_model, read_stage, resolve_checkpoint
from utils.flags.choices import WeightsKind
from utils.generation.files import read_lines

logger = logging.getLogger(__name__)


class SeededGumbelProcessor(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that their argmax is a sample from the softmax (Gumbel, 1954).

    Each row has its own random numbers, so its sample does not depend on the rest of the batch.

    Args: seeds: one per row.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        """(B, V) -> (B, V)."""
        # On the CPU, so that every device adds the same noise.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self.generators])
        # -log(-log u) is standard Gumbel; the bound avoids log(0).
        return scores - (-uniform.clamp_min(1e-38).log()).log().to(scores.device)


class TokenStreamer(BaseStreamer):
    """Hands on the tokens of transformers' `generate` as they come, without the prompts.

    Args: on_tokens: called with the next token of each row, B; what it raises ends the generation.
    """

    def __init__(self, on_tokens: Callable[[list[int]], None]):
        self.on_tokens, self.has_prompts = on_tokens, False

    def put(self, value: Tensor) -> None:
        """First the prompts (B, L), then tokens (B,)."""
        if self.has_prompts:
            self.on_tokens(value.tolist())
        self.has_prompts = True

    def end(self) -> None:
        """Nothing is held back."""


def copy_seed(seed: int, copy: int) -> int:
    """The seed of one of several continuations of a prompt; that of copy 0 is the seed itself."""
    # SeedSequence gives independent streams, unlike seed + copy, which other prompts may use.
    return int(np.random.SeedSequence([seed, copy]).generate_state(1)[0]) if copy else seed


def read_prompts(path: str | Path) -> list[str]:
    """The lines of --prompt_file, see `read_lines`."""
    return read_lines(path, "prompt_file")


def file_stem(number: int, prompt: str, seed: int) -> str:
    """The name, without its suffix, of the file of what was generated for a prompt and a seed."""
    return f"{number:03}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower())[:60]}_seed{seed}"


def sampling_processors(settings: Any, seeds: Sequence[int]) -> LogitsProcessorList:
    """Logits processors for sampling with `temperature`, `top_k` and `top_p`; none at temperature 0 (greedy).

    Args: seeds: one per row.
    """
    processors = LogitsProcessorList()
    if settings.temperature:
        # Temperature first: top-p depends on the probabilities that it gives.
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        processors.extend([TopKLogitsWarper(settings.top_k)] if settings.top_k else [])
        processors.extend([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else [])
        processors.append(SeededGumbelProcessor(seeds))  # after the filters: -inf stays -inf
    return processors


class TextGenerator:
    """Generates continuations of prompts with a causal model and its tokenizer.

    Args:
        model: in eval mode.
        tokenizer: the tokenizer that the model was trained with.
        trained_length: sequence length in training; None: unknown, so longer texts cause no warning.
    """

    def __init__(
        self,
        model: MegaTransformerForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        trained_length: int | None = None,
    ):
        self.model, self.tokenizer, self.trained_length = model, tokenizer, trained_length

    @classmethod
    def load(cls, checkpoint: str | Path, weights: WeightsKind = "ema", device: Any = "cpu") -> Self:
        """From a run or checkpoint folder of the multimodal stage.

        Raises:
            FileNotFoundError: nothing there, or nothing complete.
            ValueError: the checkpoint is of another stage.
        """
        folder, record = resolve_checkpoint(checkpoint), read_stage(checkpoint)
        stage = record["stage"]
        if stage != "multimodal":
            raise ValueError(
                f"{checkpoint} is of stage {stage!r}; text is generated by checkpoints of stage 'multimodal'"
            )
        # The tokenizer is in the checkpoint, next to the weights.
        model = load_model(MegaTransformerForCausalLM, folder, weights).requires_grad_(False).to(device)
        return cls(model, tokenizer_of(folder), record["arguments"]["sequence_length"])

    @cached_property
    def encoder(self) -> Tokenizer:
        """The encoder of the training texts, so that prompts get the same tokens."""
        return document_encoder(self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the token that begins a document. Special tokens in it are read as plain text."""
        return [document_ends(self.tokenizer)[0], *self.encoder.encode(prompt, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of tokens, without special ones.

        Args: after: the tokens before them. SentencePiece leaves the blank of a text's first token out, which belongs
            to the text of a continuation.
        """
        text = str(self.tokenizer.decode([*after, *ids], skip_special_tokens=True))
        head = str(self.tokenizer.decode(list(after), skip_special_tokens=True)) if after else ""
        # Where a character begins in one and ends in the other, the tokens are read alone.
        return text.removeprefix(head) if text.startswith(head) else self.decode(ids)

    def core_keywords(self, settings: Any) -> dict[str, Any]:
        """The arguments of the recurrent core that the flags set.

        Raises: ValueError: one of them was given for a model without a core, or an exit without a criterion.
        """
        # 0 steps and a negative threshold stand for the settings of the model.
        keywords: dict[str, Any] = {"n_thinking_steps": settings.thinking_steps} if settings.thinking_steps else {}
        keywords |= {} if settings.exit_threshold < 0 else {"exit_threshold": settings.exit_threshold}
        if keywords and not self.model.config.n_recurrent_layers:
            flag = "--thinking_steps" if settings.thinking_steps else "--exit_threshold"
            raise ValueError(f"{flag} has no effect: the model has no recurrent core")
        if keywords.get("exit_threshold") and self.model.config.recurrent_exit_criterion == "none":
            raise ValueError(
                f"--exit_threshold={settings.exit_threshold}: the model has recurrent_exit_criterion='none'"
            )
        return keywords

    def check_length(self, n_prompt: int, n_new: int) -> None:
        """Warn once if a text becomes longer than the training sequences.

        Args:
            n_prompt: tokens of the longest prompt.
            n_new: maximum number of new tokens.
        Raises: ValueError: the model has learned positions, and too few of them.
        """
        config, needed = self.model.config, n_prompt + n_new - 1  # The last token is not an input.
        given = f"a prompt of {n_prompt} tokens and max_new_tokens={n_new}"
        if config.position_embedding == "learned" and needed > config.max_position_embeddings:
            raise ValueError(
                f"{given} need {needed} positions, the model has learned max_position_embeddings="
                f"{config.max_position_embeddings}: shorten the prompt, or generate fewer tokens"
            )
        # Other position embeddings extrapolate, with worse results.
        if self.trained_length and needed > self.trained_length:
            logger.warning(
                "%s need %d positions, the model was trained with --sequence_length %d: expect worse text beyond that",
                given,
                needed,
                self.trained_length,
            )
            self.trained_length = None  # one warning is enough

    @torch.no_grad()
    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        *,
        must_fill: bool = False,
        seeds: Sequence[int] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, up to the end of the document or `max_new_tokens`.

        Prompts of different lengths are padded on the left. A continuation does not depend on the other prompts of
        the batch, since each prompt has its own stream of random numbers.

        Args:
            prompts: B lists of at least one token.
            settings: a `GenerationArguments`.
            must_fill: generate exactly `max_new_tokens`.
            seeds: B, one per prompt; None: `settings.seed` for all of them.
            on_tokens: see `TokenStreamer`; transformers has none of beams. Rows that have ended are padded.
        Raises: ValueError: the model has too few learned positions, or no core for the flags of one.
        """
        # Prompts as a batch padded on the left, and its mask: (B, L).
        config, n_prompt = self.model.config, max(map(len, prompts))
        self.check_length(n_prompt, settings.max_new_tokens)
        padding = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
        ids = torch.tensor([[padding] * (n_prompt - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (n_prompt - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # Always greedy for transformers: sampling is the argmax of logits with Gumbel noise.
        tokens = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.max_new_tokens if must_fill else None,
            num_beams=settings.n_beams,
            do_sample=False,
            pad_token_id=padding,
            logits_processor=sampling_processors(settings, seeds or [settings.seed] * len(prompts)),
            streamer=None if on_tokens is None else TokenStreamer(on_tokens),
            synced_gpus=False,  # Under ZeRO-3 either one process has the whole model, or all generate the same.
            **self.core_keywords(settings),
        )
        return [self.truncate_at_end(row) for row in tokens[:, n_prompt:]]

    def truncate_at_end(self, row: Tensor) -> list[int]:
        """The tokens (L,) before the first end-of-document token."""
        # After its end token, a finished row of the batch is padded.
        ids, end = row.tolist(), self.model.config.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids

    def continue_texts(
        self, prompts: Sequence[str], settings: Any, seeds: Sequence[int] | None = None, **keywords: Any
    ) -> list[str]:
        """The continuation of each prompt, without the prompt; keywords as in `continue_tokens`."""
        ids_of_prompts = [self.encode(prompt) for prompt in prompts]
        continuations = self.continue_tokens(ids_of_prompts, settings, seeds=seeds, **keywords)
        return [self.decode(ids, after) for after, ids in zip(ids_of_prompts, continuations, strict=True)]


def split_windows(dataset: Any, n_samples: int, n_new: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and their true continuations from a data set of windows.

    Args:
        dataset: samples with `input_ids` and `segment_ids`, (L,).
        n_samples: number of windows, evenly spaced over the data set.
        n_new: maximum number of tokens of a continuation.
    Returns: pairs of token lists. Prompt and continuation are from the same document, and the prompt is at least as
        long. A prompt and n_new tokens fit into a window if n_new is at most half of one.
    """
    pairs = []
    for index in evenly_spaced(len(dataset), n_samples):
        sample = dataset[index]
        # The longest document of the window is split in the middle, or n_new tokens before its end.
        runs = np.split(sample["input_ids"].numpy(), np.flatnonzero(np.diff(sample["segment_ids"].numpy())) + 1)
        document = max(runs, key=len).tolist()
        cut = max(-(-len(document) // 2), len(document) - n_new)
        pairs.append((document[:cut], document[cut : cut + n_new]))
    return pairs


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a checkpoint folder. Raises: OSError, ValueError: it is missing or damaged; names the file."""
    if (folder / COMPLETE).is_file():  # A Llama's folder has no digests.
        check_files(folder, [file.name for file in folder.glob("*token*.json")])
    with explained_loading(folder / "tokenizer.json"):
        return load_tokenizer(str(folder))


def check_tokenizer(folder: Path, dataset: TextDataset, advice: str) -> None:
    """Check that texts were tokenised by the tokenizer of a checkpoint.

    Args:
        folder: a checkpoint folder of the multimodal stage.
        dataset: the texts.
        advice: the remedy, for the message.
    Raises: ValueError: names both tokenizers.
    """
    # Tokenizers are compared by their content, not by their paths.
    other = tokenizer_of(folder)
    tokenizer, expected = tokenizer_hash(dataset.tokenizer), tokenizer_hash(other)
    if tokenizer != expected:
        raise ValueError(
            f"{folder} was trained with tokenizer {expected} of {vocabulary_size(other)} tokens, the texts in "
            f"{dataset.folder} have tokenizer {tokenizer} of {dataset.vocab_size} tokens: {advice}"
        )
