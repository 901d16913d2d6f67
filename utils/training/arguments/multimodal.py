"""Flags of the multimodal stage, and of its texts."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar, Literal

from model.presets import MEGATRANSFORMER, MULTIMODAL
from utils.megatransformer_utils import BatchSize
from utils.options import Section, option
from utils.training.arguments.lora import LoRAArguments


@dataclasses.dataclass
class TextArguments:
    """Flags of a stage that trains on text."""

    SECTION_TEXTS: ClassVar = Section("Texts")
    text_dataset: str = option(
        "",
        "file, folder, .jsonl, .csv, .tsv, .parquet, .tar, hub name, or python-topics; default: the existing cache",
    )
    text_column: str = option("text", "text column of a table or hub data set", only_with=("text_dataset", bool))
    text_config: str = option("", "configuration of a hub data set", only_with=("text_dataset", bool))
    text_split: str = option("train", "training split of a hub data set", only_with=("text_dataset", bool))
    # Held-out texts.
    validation_dataset: str = option(
        "",
        "held-out texts; default: the validation split of text_dataset, or validation_fraction of it",
        only_with=("text_dataset", bool),
    )
    validation_split: str = option(
        "validation", "split of a hub data set in validation_dataset", only_with=("validation_dataset", bool)
    )
    validation_fraction: float | None = option(
        None,
        "fraction of text_dataset's documents that is held out; default: its validation split, else 0.05",
        gt=0,
        lt=1,
        only_with=[("text_dataset", bool), ("validation_dataset", "")],
    )
    # Documents that cannot be read.
    max_broken_fraction: float = option(
        0.01,
        "maximum fraction of documents that are unreadable or not text",
        ge=0,
        le=1,
        only_with=("text_dataset", bool),
    )
    keep_duplicates: bool = option(False, "keep documents that equal an earlier one", only_with=("text_dataset", bool))
    document_bytes: int = option(
        8192,
        "size in bytes of the parts into which few documents are cut, so that some can be held out; 0: never",
        ge=0,
        only_with=[("text_dataset", bool), ("validation_dataset", "")],
    )
    # Tokens and windows.
    tokenizer: str = option(
        "bytes",
        "bytes; bpe, trained on the texts; or a tokenizer's folder, tokenizer.json or hub name",
        only_with=("text_dataset", bool),
    )
    tokenizer_vocab_size: int = option(
        4096, "vocabulary size of bpe, including special tokens", gt=0, only_with=("tokenizer", "bpe")
    )
    sequence_length: int = option(256, "tokens per sample", gt=1)


HAS_SPANS = ("include_modes", ("image", "audio"))


@dataclasses.dataclass
class MultimodalArguments(TextArguments, LoRAArguments):
    """Flags of the multimodal stage."""

    stage: ClassVar = "multimodal"
    presets: ClassVar = {**MEGATRANSFORMER, **MULTIMODAL}

    SECTION_STREAMS: ClassVar = Section("Streams of text, images and audio")
    include_modes: list[Literal["text", "audio", "image"]] = option(
        ["text"], "modalities of the model; text always, with others texts are the captions of their latents"
    )

    # Images and audio.
    image_latents: str = option(
        "", "folder of image latents; default: cached_datasets/image_diffusion", only_with=("include_modes", "image")
    )
    audio_latents: str = option(
        "", "folder of audio latents; default: cached_datasets/audio_diffusion", only_with=("include_modes", "audio")
    )
    image_vae_checkpoint: str = option(
        "",
        "run or checkpoint folder of the image latents' VAE; default: its copy in the run or the cache",
        only_with=("include_modes", "image"),
    )
    audio_vae_checkpoint: str = option("", "the same of the audio latents", only_with=("include_modes", "audio"))
    image_vae_config: str = option(
        "", "preset of the image VAE, checked against its checkpoint", only_with=("include_modes", "image")
    )
    audio_vae_config: str = option("", "the same of the audio VAE", only_with=("include_modes", "audio"))
    tasks: list[str] = option(
        [],
        "streams to train, modalities joined by '-', with the rows that an item has in each per epoch, such as "
        "text-image:3 or text-image-text:0.2; default: image-text:1 text-image:3 audio-text:1 text-audio:4, as far as "
        "included, with texts text:1, with batch_tokens text-image-text:0.2 text-audio-text:0.2",
        only_with=HAS_SPANS,
    )
    batch_size: BatchSize = option(
        16, "samples per micro-batch and process; auto: as many as fit", gt=0, only_with=("batch_tokens", 0)
    )
    batch_tokens: int = option(
        0, "tokens of a micro-batch and process, streams of like length; 0: batch_size", ge=0, only_with=HAS_SPANS
    )
    caption_tokenizer: str = option(
        "bpe",
        "bpe, trained on the texts; bytes; or a tokenizer's folder or hub name; that of text_dataset or init_from "
        "where they are given",
        only_with=HAS_SPANS,
    )
    caption_vocab_size: int = option(
        400,
        "vocabulary size of bpe, including special tokens",
        gt=0,
        only_with=[HAS_SPANS, ("caption_tokenizer", "bpe")],
    )
    latent_weight_power: float = option(
        1.0,
        "latent channels are weighted by what they carry of the decoded signal to this power; 0: equally",
        ge=0,
        only_with=HAS_SPANS,
    )

    flex_attention: bool = option(
        False,
        "attention of the trunk by FlexAttention, which leaves out blocks that the mask hides; NVIDIA GPUs alone",
        only_with=HAS_SPANS,
    )

    SECTION_TRAINED: ClassVar = Section("Optimizer")
    freeze: list[str] = option(
        [], "parts that are not trained: trunk, text, image, audio, or modules such as encoder.encoders.image.prelude"
    )
    learning_rates: list[str] = option(
        [], "factors of learning_rate for some parts, named as in freeze, such as trunk:0.1 image:2; the last counts"
    )

    learning_rate: float = option(6e-4, "peak learning rate of AdamW", gt=0)
    num_train_epochs: float = option(1.0, "passes over the training set; ignored where max_steps is given", gt=0)

    SECTION_CORE: ClassVar = Section("Recurrent core")
    recurrent_steps_per_rank: bool = option(False, "sample the number of thinking steps on every process by itself")
    recurrent_curriculum: float = option(
        0.0, "fraction of the steps over which the mean number of thinking steps grows from 1; 0: none", ge=0, le=1
    )

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    eval_thinking_steps: list[int] = option(
        [], "numbers of thinking steps in evaluation; default: 1, 2, the mean, twice the mean", gt=0
    )
    sample_tokens: int = option(
        64, "maximum number of tokens of a logged continuation", gt=0, only_with=("n_samples", bool)
    )
    n_logged_samples: int = option(
        4,
        "validation items per task whose images, clips and texts are generated for TensorBoard; 0: none",
        ge=0,
        only_with=HAS_SPANS,
    )
    vocoder_checkpoint: str = option(
        "",
        "run or checkpoint folder of the vocoder of logged clips; default: Griffin-Lim",
        only_with=[("include_modes", "audio"), ("n_logged_samples", bool)],
    )
    n_samples: int = option(4, "validation prompts whose continuations are logged to TensorBoard; 0: none", ge=0)

    def validate_modes(self):
        if "text" not in self.include_modes or len(set(self.include_modes)) < len(self.include_modes):
            raise ValueError(
                f"--include_modes={self.include_modes} must name text, and each mode once; give --include_modes text, "
                "or text image audio"
            )

    def validate_ranks(self):
        if not (self.recurrent_steps_per_rank and self.use_deepspeed):
            return
        if json.loads(Path(self.deepspeed_config).read_bytes()).get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                f"--recurrent_steps_per_rank with ZeRO stage 3 ({self.deepspeed_config}): processes that run layers a "
                "different number of times deadlock; use stage 2 or below, or leave it out"
            )
