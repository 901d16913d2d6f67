"""The multimodal stage with images and audio: its caches of latents, checked against their VAEs, and what they
determine of the model's configuration.  Z latent channels."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import MultimodalDataset, Task, collate_streams, join_items, parse_task
from dataset_loading.text.tokenizers import byte_tokenizer, document_ends, load_tokenizer, train_bpe, vocabulary_size
from model.audio.vae import AudioVAE
from model.multimodal import MegaTransformerMultimodal
from model.presets import MULTIMODAL
from utils.checkpoints import read_stage, resolve_checkpoint
from utils.configuration import MegaTransformerConfig
from utils.distributed import launched_rank
from utils.generation.latents import Media, find_vae, load_vae, pin_vae
from utils.training.multimodal import MultimodalArguments, ThinkingStepsCallback
from utils.training.multimodal_logging import sample_callbacks
from utils.training.multimodal_streams import MultimodalStreamTrainer
from utils.training.stage import Stage
from utils.training.text import check_core_flags

CACHES = {"image": ImageLatentDataset, "audio": AudioLatentDataset}
# Streams by default, with their weights: generation takes longer to learn than understanding.
DEFAULT_TASKS = {"image": ["image-text:1", "text-image:3"], "audio": ["audio-text:1", "text-audio:4"]}
# Flags of text alone.
OF_TEXT = ("text_dataset", "cached_dataset", "sequence_length", "n_samples", "sample_tokens", "eval_thinking_steps")


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

        Raises: ValueError: a task has a modality that is not among the run's.
        """
        names = self.args.tasks or [task for name in self.names for task in DEFAULT_TASKS[name]]
        tasks = [parse_task(name) for name in names]
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
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the texts, trained on those of the training split where it is no other one's."""
        name = self.args.caption_tokenizer
        if name == "bytes":
            return byte_tokenizer()
        if name != "bpe":
            return load_tokenizer(name)
        texts = sorted({item.text for item in join_items(self.train_caches)})
        return train_bpe(texts, self.args.caption_vocab_size)

    # ---- What a stage states.

    def prepare(self):
        """Keep copies of the VAEs, without which the run's model says nothing."""
        for name in self.names:
            checkpoint = self.vae_checkpoint(name)
            if launched_rank() == 0:
                pin_vae(checkpoint, self.run_dir / name, may_replace=False)

    def build_config(self):
        """The preset with what modalities, tokenizer and latents determine."""
        check_flags(self.args)
        for path in filter(None, (self.args.init_from, self.find_checkpoint())):
            self.check_checkpoint(path)
        for name in self.names:  # A VAE that is named must be that of the latents.
            self.vae_checkpoint(name)
        config = self.fit(super().build_config())
        check_core_flags(self.args, config)
        return config

    def build_dataset(self, split, config):
        caches = self.train_caches if split == "train" else self.caches(split)
        return MultimodalDataset(caches, self.tasks, self.tokenizer, config=config, is_training=split == "train")

    def build_collator(self, config):
        return collate_streams

    def build_trainer_parts(self, model):
        weights = {} if self.args.dry_run else self.channel_weights()
        return {"tokenizer": self.tokenizer, "channel_weights": weights}

    def build_callbacks(self, trainer, writer):
        return [ThinkingStepsCallback(trainer, writer), *sample_callbacks(trainer, writer, load_vae=self.load_vae)]

    def extra_record(self):
        return {"latents": {name: dict(cache.manifest["settings"]) for name, cache in self.train_caches.items()}}

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
            if rows != columns:
                raise ValueError(f"{cache.folder} has latents of {rows} x {columns}; the model takes square images")
            size = settings["image_size"]
            fields |= {"image_latent_channels": Z, "image_size": size, "image_compression": size // rows}
        return fields

    def check_checkpoint(self, path: str | Path) -> None:
        """Raises: ValueError: a checkpoint to start from or to resume comes from latents of other VAEs, or is one of
        text alone."""
        latents = read_stage(resolve_checkpoint(path), "multimodal").get("latents", {})
        for name, cache in self.train_caches.items():
            expected = cache.manifest["settings"]["vae_fingerprint"]
            if (other := latents.get(name, {}).get("vae_fingerprint")) != expected:
                raise ValueError(
                    f"{path} was trained on {name} latents of the VAE {other}, those in {cache.folder} are of the VAE "
                    f"{expected}, which mean nothing to its weights; give its own latents with --{name}_latents"
                )


def check_flags(args: Any) -> None:
    """Raises: ValueError: a flag of text alone is given."""
    given = [name for name in OF_TEXT if name in getattr(args, "given", ())]
    if given:
        modes = " ".join(args.include_modes)
        raise ValueError(
            f"--{given[0]} has no effect with --include_modes {modes}: texts are those of --image_latents and "
            "--audio_latents"
        )


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
    audio times the norm of the decoder's linear path in units of the log-mel."""
    scales: Tensor = vae.latent_std.float()
    if not isinstance(vae, AudioVAE) or vae.config.architecture != "conv1d":
        return scales
    # Rows of the weight are mel bins times frames of a patch.
    units = vae.band_std.repeat_interleave(vae.config.patch_frames)
    weight: Any = vae.decoder.code.weight
    return scales * (weight.float() * units[:, None]).norm(dim=0)
