"""The multimodal stage with images and audio: its caches of latents, checked against their VAEs, and what they
determine of the model's configuration.  Z latent channels."""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import MultimodalDataset, Task, collate_streams, join_items, parse_task, torn_items
from dataset_loading.text.tokenizers import (
    byte_tokenizer,
    document_ends,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from dataset_loading.text.windows import TextDataset
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.multimodal import MegaTransformerMultimodal
from model.presets import MULTIMODAL
from utils.checkpoints import load_config, read_stage, resolve_checkpoint
from utils.configuration import MegaTransformerConfig
from utils.distributed import launched_rank
from utils.generation.latents import Media, find_vae, load_vae, pin_vae
from utils.generation.text import check_tokenizer
from utils.generation.text_weights import check_trunk, is_text_run, model_from_text
from utils.training.arguments.multimodal import MultimodalArguments
from utils.training.budget_batches import count_budget_steps
from utils.training.multimodal import ThinkingStepsCallback
from utils.training.stage import Stage
from utils.training.streams.samples import sample_callbacks
from utils.training.streams.trainer import MultimodalStreamTrainer
from utils.training.text import check_core_flags, tokenize_texts, untokenized

logger = logging.getLogger(__name__)

CACHES = {"image": ImageLatentDataset, "audio": AudioLatentDataset}
# Streams by default, with their weights: generation takes longer to learn than understanding.
DEFAULT_TASKS = {"image": ["image-text:1", "text-image:3"], "audio": ["audio-text:1", "text-audio:4"]}
# Streams that go on after a span, in a small share: batches of like length alone do not pad all others to theirs.
INTERLEAVED_TASKS = {"image": "text-image-text:0.2", "audio": "text-audio-text:0.2"}
# Flags of models of text alone, and those of the tokenizer of the latents' texts.
OF_TEXT_ALONE = ("n_samples", "sample_tokens", "eval_thinking_steps")
OF_CAPTIONS = ("caption_tokenizer", "caption_vocab_size")


class MultimodalStreamStage(Stage):
    """The multimodal stage with images, audio or both beside text; `pretrain_multimodal.py` runs it."""

    name = "multimodal"
    arguments_class = MultimodalArguments
    config_class = MegaTransformerConfig
    model_class = MegaTransformerMultimodal
    presets = MULTIMODAL
    trainer_class = MultimodalStreamTrainer

    @cached_property
    def names(self) -> list[Media]:
        """The modalities beside text."""
        return [name for name in ("image", "audio") if name in self.args.include_modes]

    @cached_property
    def tasks(self) -> list[Task]:
        """The kinds of streams.

        Raises: ValueError: a task has a modality that is not among the run's, is named twice, or texts are named that
            no task has.
        """
        names = [task for name in self.names for task in DEFAULT_TASKS[name]]
        names += [INTERLEAVED_TASKS[name] for name in self.names] if self.args.batch_tokens else []
        names += ["text:1"] if self.has_texts else []
        tasks = [parse_task(name) for name in self.args.tasks or names]
        counts = Counter(task.name for task in tasks)
        if twice := [name for name in counts if counts[name] > 1]:
            raise ValueError(f"--tasks names {twice[0]} twice; give it once, with its weight")
        if self.has_texts and "text" not in counts:
            raise ValueError(f"--tasks {' '.join(counts)} has no rows for the texts in {self.text_folder}; add text:1")
        for task in tasks:
            if missing := set(task.modalities) - set(self.args.include_modes):
                raise ValueError(f"--tasks {task.name} needs --include_modes with {', '.join(sorted(missing))}")
        return tasks

    def folder(self, name: Media) -> Path:
        """The folder of a modality's latents."""
        return Path(getattr(self.args, f"{name}_latents") or f"cached_datasets/{name}_diffusion")

    def caches(self, split: str) -> dict[str, Any]:
        """The latents of one split by modality."""
        return {name: CACHES[name](self.folder(name), split) for name in self.names}

    @cached_property
    def train_caches(self) -> dict[str, Any]:
        """Those of the training split."""
        return self.caches("train")

    @cached_property
    def held_out(self) -> set[str]:
        """Names of the items that are held out in one cache of latents and not in the other."""
        names = torn_items(self.train_caches, self.caches("validation"))
        if names:
            logger.warning(
                "%d items are kept out of training: of their latents one cache holds them out and the other does not, "
                "such as %s; give both preprocessing commands a --validation_dataset, or make both from one table",
                *(len(names), ", ".join(sorted(names)[:5])),
            )
        return names

    @property
    def has_texts(self) -> bool:
        """Whether there are further texts beside those of the latents."""
        is_recorded = self.resumption is not None and "texts" in self.resumption.record
        return bool(self.args.text_dataset or self.args.cached_dataset or is_recorded)

    @property
    def text_folder(self) -> Path:
        """The folder of tokenised texts."""
        return Path(self.args.cached_dataset or "cached_datasets/text")

    def windows(self, split: str) -> TextDataset | None:
        """The windows of further texts, if there are any."""
        return TextDataset(self.text_folder, split, self.args.sequence_length) if self.has_texts else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of all texts: that of the checkpoint which the run goes on from, else that of further texts,
        else what the flags say.

        Raises: ValueError: flags or texts have another one than the checkpoint.
        """
        windows, checkpoint = self.windows("train"), self.find_checkpoint() or self.args.init_from
        if windows is not None and checkpoint:
            folder = resolve_checkpoint(checkpoint)
            check_tokenizer(folder, windows, f"prepare them with --tokenizer {folder} and another --cached_dataset")
        if windows is not None:
            tokenizer, owner = windows.tokenizer, f"the texts in {windows.folder}"
        elif checkpoint:
            tokenizer, owner = load_tokenizer(str(resolve_checkpoint(checkpoint))), str(checkpoint)
        else:
            return self.caption_tokenizer()
        given = [] if self.resumption else [name for name in OF_CAPTIONS if name in getattr(self.args, "given", ())]
        if given and tokenizer_hash(self.caption_tokenizer()) != tokenizer_hash(tokenizer):
            raise ValueError(
                f"--{given[0]} {getattr(self.args, given[0])}: this run has the tokenizer of {owner}, which is "
                "another one; leave it out"
            )
        return tokenizer

    def caption_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the flags describe, trained on the texts of the training split where it is bpe."""
        name = self.args.caption_tokenizer
        if name == "bytes":
            return byte_tokenizer()
        if name != "bpe":
            return load_tokenizer(name)
        texts = sorted({item.text for item in join_items(self.train_caches)})
        return train_bpe(texts, self.args.caption_vocab_size)

    # ---- What a stage states.

    def prepare(self):
        """Tokenise further texts, and keep copies of the VAEs, without which the run's model says nothing."""
        check_flags(self.args, self.has_texts)
        if self.has_texts and self.tasks:
            tokenize_texts(self.args, self.text_folder)
        for name in self.names:
            checkpoint = self.vae_checkpoint(name)
            if launched_rank() == 0:
                pin_vae(checkpoint, self.run_dir / name, may_replace=False)

    def unprepared(self):
        return untokenized(self.args, self.text_folder) if self.has_texts else ""

    def build_config(self):
        """The preset with what modalities, tokenizer and latents determine."""
        check_flags(self.args, self.has_texts)
        for path in filter(None, (self.args.init_from, self.find_checkpoint())):
            self.check_checkpoint(path)
        for name in self.names:  # A VAE that is named must be that of the latents.
            check_speakers(name, self.vae_checkpoint(name))
        config = self.fit(super().build_config())
        check_core_flags(self.args, config)
        if self.starts_from_text:
            check_trunk(config, self.args.init_from)
            if self.resumption is None:
                check_frozen_text(self.args)
        check_flex_attention(self.args, config)
        return config

    @property
    def starts_from_text(self) -> bool:
        """Whether `--init_from` names a model of text alone."""
        return bool(self.args.init_from) and is_text_run(self.args.init_from)

    def build_model(self, config):
        """As for all stages, or with the trunk of a model of text."""
        is_text = self.starts_from_text
        model = model_from_text(config, self.args.init_from) if is_text else super().build_model(config)
        model.uses_flex_attention = self.args.flex_attention
        return model

    def build_dataset(self, split, config):
        caches = self.train_caches if split == "train" else self.caches(split)
        options = {"config": config, "is_training": split == "train", "windows": self.windows(split)}
        options["held_out"] = self.held_out if split == "train" else ()
        return MultimodalDataset(caches, self.tasks, self.tokenizer, **options)

    def count_steps(self, dataset, n_ranks):
        if not self.args.batch_tokens:
            return super().count_steps(dataset, n_ranks)
        return count_budget_steps(dataset.lengths, self.args.batch_tokens, self.args, n_ranks, "tokens")

    def build_collator(self, config):
        return collate_streams

    def build_trainer_parts(self, model):
        weights = {} if self.args.dry_run else self.channel_weights()
        return {"tokenizer": self.tokenizer, "channel_weights": weights}

    def build_callbacks(self, trainer, writer):
        return [ThinkingStepsCallback(trainer, writer), *sample_callbacks(trainer, writer, load_vae=self.load_vae)]

    def extra_record(self):
        latents = {name: dict(cache.manifest["settings"]) for name, cache in self.train_caches.items()}
        return {"latents": latents, **({"texts": {"folder": str(self.text_folder)}} if self.has_texts else {})}

    # ---- VAEs.

    def vae_checkpoint(self, name: Media) -> Path:
        """The VAE that encoded a modality's latents.

        Raises: FileNotFoundError, ValueError: see `find_vae`.
        """
        settings = self.train_caches[name].manifest["settings"]
        given = "" if self.args.resume_from_checkpoint else getattr(self.args, f"{name}_vae_checkpoint")
        folders = (self.run_dir / name, self.folder(name))
        return find_vae(settings, f"the latents in {self.folder(name)}", given=given, folders=folders, media=name)

    def load_vae(self, name: Media) -> Any:
        """That VAE, frozen; its preset must be that of `--image_vae_config` or `--audio_vae_config` where given."""
        preset = getattr(self.args, f"{name}_vae_config")
        return load_vae(self.vae_checkpoint(name), preset, media=name).requires_grad_(False)

    def channel_weights(self) -> dict[str, Tensor]:
        """Weight of each latent channel: how much of the decoded signal it carries, to the power of
        `--latent_weight_power`."""
        power = self.args.latent_weight_power
        return {name: channel_scales(self.load_vae(name)) ** power for name in self.names} if power else {}

    def record(self, dataset, zero_stage, n_steps):
        """As for all stages, with the fingerprint of each folder of latents."""
        record = super().record(dataset, zero_stage, n_steps)
        for name, cache in self.train_caches.items():
            record["latents"][name]["fingerprint"] = cache.fingerprint
        return record

    # ---- Configuration.

    def fit(self, config: MegaTransformerConfig) -> MegaTransformerConfig:
        """The configuration with what modalities, tokenizer and latents determine.

        Raises: ValueError: an override contradicts them.
        """
        overridden = {pair.partition("=")[0]: None for pair in self.args.override}
        required = {**self.latent_fields(), **token_fields(config, self.tokenizer, self.names)}
        for name in overridden.keys() & required.keys():
            if (value := getattr(config, name)) != required[name]:
                raise ValueError(
                    f"--override {name}={value} does not fit the latents and the tokenizer of this run, which need "
                    f"{name}={required[name]}; leave it out"
                )
        # The vocabulary grows first: what the preset says of tokens must fit into it.
        grown = config.replace(vocab_size=max(config.vocab_size, required["vocab_size"]))
        return grown.with_modalities(["text", *self.names]).replace(**required)

    def latent_fields(self) -> dict[str, Any]:
        """Fields that the latents determine."""
        fields: dict[str, Any] = {}
        for name, cache in self.train_caches.items():
            settings = cache.manifest["settings"]
            if name == "audio":
                fields |= {"audio_latent_channels": settings["latent_channels"], "audio_latent_rows": 1}
                continue
            Z, rows, columns = settings["latent_shape"]
            if rows != columns or settings.get("aspect_buckets"):
                raise ValueError(
                    f"{cache.folder} has latents of {rows} x {columns} or in aspect_buckets; the model takes square "
                    "images: make them without --aspect_buckets"
                )
            size = settings["image_size"]
            fields |= {"image_latent_channels": Z, "image_size": size, "image_compression": size // rows}
        return fields

    def check_checkpoint(self, path: str | Path) -> None:
        """Raises: ValueError: a checkpoint to start from or to resume comes from latents of other VAEs, or one to
        resume is of text alone."""
        if path == self.args.init_from and self.starts_from_text:
            return
        latents = read_stage(resolve_checkpoint(path), "multimodal").get("latents", {})
        for name, cache in self.train_caches.items():
            expected = cache.manifest["settings"]["vae_fingerprint"]
            if (other := latents.get(name, {}).get("vae_fingerprint")) != expected:
                raise ValueError(
                    f"{path} was trained on {name} latents of the VAE {other}, those in {cache.folder} are of the VAE "
                    f"{expected}, which mean nothing to its weights; give its own latents with --{name}_latents"
                )


def check_flags(args: Any, has_texts: bool) -> None:
    """Raises: ValueError: a flag of text alone is given, or one of further texts where there are none; a window of
    texts is longer than a batch may be."""
    refused = [*OF_TEXT_ALONE, *([] if has_texts else ["sequence_length"])]
    if given := [name for name in refused if name in getattr(args, "given", ())]:
        needs = "only text" if given[0] in OF_TEXT_ALONE else "--text_dataset or --cached_dataset"
        raise ValueError(
            f"--{given[0]} has no effect with --include_modes {' '.join(args.include_modes)}; it needs {needs}"
        )
    if has_texts and 0 < args.batch_tokens < args.sequence_length:
        raise ValueError(
            f"--batch_tokens={args.batch_tokens} is below --sequence_length={args.sequence_length}, so that no window "
            "of text fits into a batch; raise it, or give shorter windows"
        )


def check_frozen_text(args: Any) -> None:
    """Raises: ValueError: the rows of further tokens, which a model of text does not have, would stay random."""
    if args.lora_rank:
        raise ValueError(
            f"--lora_rank={args.lora_rank} with --init_from {args.init_from}, a model of text: what it does not have "
            "(embeddings of <null>, begin and end, encoders and decoders of latents) would stay random; start from a "
            "run on streams, or leave --lora_rank out and give --learning_rates trunk:0.1"
        )
    if "text" in args.freeze:
        raise ValueError(
            f"--freeze {' '.join(args.freeze)} with --init_from {args.init_from}, a model of text: the embeddings of "
            "tokens that it does not have (<null>, begin and end of images and audio, lengths) would stay random; "
            "give --learning_rates text:0.01 in place of --freeze text"
        )


def check_speakers(name: Media, checkpoint: Path) -> None:
    """Raises: ValueError: an audio VAE decodes for a speaker, which this model does not know; names its folder."""
    if name == "audio" and load_config(AudioVAEConfig, checkpoint).speakers:
        raise ValueError(
            f"the audio VAE at {checkpoint} was trained with --use_speakers and decodes nothing without a speaker, "
            "which this model does not know; use latents of a VAE without --use_speakers"
        )


def check_flex_attention(args: Any, config: MegaTransformerConfig) -> None:
    """Raises: ValueError: FlexAttention is asked for without a GPU, or for a model with what it lacks."""
    if not args.flex_attention:
        return
    if not torch.cuda.is_available():
        raise ValueError("--flex_attention needs an NVIDIA GPU: it has no backward pass on a CPU; leave it out")
    if config.attention_dropout or config.use_alibi_bias:
        name = "attention_dropout" if config.attention_dropout else "use_alibi_bias"
        raise ValueError(f"--flex_attention knows no {name}={getattr(config, name)}; leave one of the two out")


def token_fields(
    config: MegaTransformerConfig, tokenizer: PreTrainedTokenizerFast, names: Sequence[str]
) -> dict[str, int]:
    """Ids of all tokens: those of the tokenizer, then <null>, begin and end of each modality, lengths of audio."""
    begin, end = document_ends(tokenizer)
    n_text = vocabulary_size(tokenizer)
    padding = tokenizer.pad_token_id
    fields = {"bos_token_id": begin, "eos_token_id": end, "null_token_id": n_text}
    fields["pad_token_id"] = padding if isinstance(padding, int) else end
    for number, name in enumerate(names):
        fields |= {f"{name}_begin_token_id": n_text + 1 + 2 * number, f"{name}_end_token_id": n_text + 2 + 2 * number}
    fields["vocab_size"] = n_text + 1 + 2 * len(names)
    if "audio" in names:
        fields["audio_length_token_id"] = fields["vocab_size"]
        fields["vocab_size"] += config.audio_max_tokens
    return fields


def channel_scales(vae: Any) -> Tensor:
    """How much each standardised latent channel carries of what is decoded, (Z,): its std in the VAE's units, for
    audio times the norm of the decoder's linear path in units of the log-mel. With latent rows (Z n_rows,)."""
    scales: Tensor = vae.latent_std.float()
    if not isinstance(vae, AudioVAE):
        return scales
    if vae.config.architecture != "conv1d":
        return scales.repeat_interleave(vae.config.n_rows)
    # Rows of the weight are mel bins times frames of a patch.
    units = vae.band_std.repeat_interleave(vae.config.patch_frames)
    weight: Any = vae.decoder.code.weight
    return scales * (weight.float() * units[:, None]).norm(dim=0)
