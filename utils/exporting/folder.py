"""A checkpoint as a folder that opens with `from_pretrained`, and that every script accepts as a checkpoint."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataset_loading.files import replacing, sync_to_disk
from utils.checkpoints import (
    CARD,
    CONFIG,
    EXPORTED,
    LORA,
    STAGE,
    check_files,
    data_of,
    load_model,
    mark_complete,
    read_stage,
    weight_files,
    without_copies,
    write_json,
)
from utils.exporting.arguments import DType, Format
from utils.exporting.card import model_card, opening, read_metrics
from utils.exporting.diffusers_folder import check_layout, diffusers_opening, write_diffusers
from utils.exporting.stages import ExportedModel, model_of
from utils.flags.choices import WeightsKind
from utils.generation.audio import load_vocoder
from utils.generation.exported import TEXT_ENCODER, VOCODER, home_of, trained_steps
from utils.generation.latents import PINNED, Media, find_vae
from utils.generation.text_encoder import load_text_encoder

# Files beside the weights that a model is opened with, of those that have them.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)


@dataclasses.dataclass(frozen=True)
class Content:
    """What an exported folder holds.

    Attributes:
        name: of the model's folder, in its card.
        hub_name: of its repository on the hub; "" for none.
        weights, dtype: which weights, and how they are stored.
        format: library whose `from_pretrained` opens the folder.
        license: for the card.
        with_parts: also the models that this one needs, in subfolders.
        vocoder: checkpoint of a vocoder for the subfolder; "" for none.
        vaes: modality -> path of its VAE; where it is not given, the copy of the run.
        text_encoder: folder or hub name of the frozen text encoder; "" for the recorded one.
    """

    name: str
    weights: WeightsKind = "ema"
    dtype: DType = "float32"
    format: Format = "transformers"
    license: str = ""
    with_parts: bool = False
    vocoder: str = ""
    vaes: dict[str, str] = dataclasses.field(default_factory=dict)
    text_encoder: str = ""
    hub_name: str = ""


def check_output(output: Path) -> None:
    """Raises: FileExistsError: the folder holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is not an empty folder; give another one, or remove it")


def export_folder(checkpoint: Path, output: Path, content: Content) -> None:
    """Write the folder under a temporary name, open it, and rename it.

    Args: checkpoint: a complete checkpoint, or an exported folder.
    Raises:
        OSError, ValueError: the output exists, the checkpoint is damaged, or what it needs is not there.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, sync=True) as temporary:
        write_folder(checkpoint, temporary, content)
        if output.exists():
            output.rmdir()  # An empty folder stands where the new one goes.


def next_command(checkpoint: Path, output: Path, format: Format) -> str:
    """A command that uses the exported folder of a checkpoint."""
    if format == "diffusers":
        script = f"pretrain_{read_stage(checkpoint)['stage']}.py"
        return shlex.join(["python", script, "--config", "ldm", "--init_from", str(output)])
    speakers = json.loads((output / CONFIG).read_text()).get("speakers") or ()
    return model_of(read_stage(checkpoint), checkpoint).command_for(str(output), speakers)


def write_folder(checkpoint: Path, folder: Path, content: Content) -> None:
    """The model, the models it needs, and the card."""
    record = dict(read_stage(checkpoint))
    kind = model_of(record, checkpoint)
    model = load_model(kind.model_class, checkpoint, content.weights)
    # The record, without the folder of the machine that it was trained on.
    export = {"step": trained_steps(checkpoint), "weights": content.weights, "dtype": content.dtype}
    record = portable({**record, EXPORTED: export}, record.get("working_directory", ""))
    if content.format == "diffusers":
        check_layout(record["stage"], model)
    folder.mkdir(parents=True)
    needs = needed_models(checkpoint, folder, content)
    if content.format == "diffusers":
        write_diffusers(model, folder, getattr(torch, content.dtype))
        use = diffusers_opening(content.hub_name or content.name, model)
    else:
        write_checkpoint(checkpoint, folder, content, model=model, needs=needs, record=record)
        use = opening(content.name, kind, getattr(model.config, "speakers", ()), hub_name=content.hub_name)
    # The card is not in COMPLETE.json: whoever publishes the model edits it.
    metrics = portable(read_metrics(checkpoint, export["step"]), "")
    described = {name: need.description for name, need in needs.items()}
    card = model_card(content.name, kind, record, use=use, needs=described, license=content.license, metrics=metrics)
    (folder / CARD).write_text(card, encoding="utf-8")
    sync_to_disk(folder / CARD)


def write_checkpoint(
    checkpoint: Path, folder: Path, content: Content, *, model: Any, needs: dict[str, "Need"], record: dict[str, Any]
) -> None:
    """Weights, configuration, tokenizer and record, compared with the checkpoint; scripts read the folder as one."""
    kind = model_of(record, checkpoint)
    write_weights(checkpoint, folder, content, model)
    # Configuration, with what the model needs, and the tokenizer.
    write_config(checkpoint, folder, needs, content.dtype if kind.auto_class == "AutoModelForCausalLM" else "float32")
    for name in COMPANIONS:
        if (checkpoint / name).is_file():
            check_files(checkpoint, [name])
            shutil.copyfile(checkpoint / name, folder / name)
    write_json(folder / STAGE, record)
    compare(folder, kind, model, content.dtype)
    mark_complete(folder)


def write_weights(checkpoint: Path, folder: Path, content: Content, model: nn.Module) -> None:
    """The weights as model.safetensors: byte for byte in float32, so that a VAE keeps its fingerprint; with adapters
    merged.

    Buffers, such as latent statistics, stay as they are.
    """
    dtype, buffers = getattr(torch, content.dtype), {name for name, _ in model.named_buffers()}

    def write_state(state: dict[str, Tensor], target: Path) -> None:
        state = {
            name: value if name in buffers or not value.is_floating_point() else value.to(dtype)
            for name, value in state.items()
        }
        save_file(state, target, {"format": "pt"})

    if (checkpoint / LORA).is_file():  # No file has the merged weights.
        write_state(without_copies(model, model.state_dict()), folder / "model.safetensors")
        return
    files = weight_files(checkpoint, content.weights)
    for file in files:
        target = folder / ("model.safetensors" if len(files) == 1 else file.name)
        if content.dtype == "float32":
            shutil.copyfile(file, target)
        else:
            write_state(load_file(file), target)
    # transformers lists the files of large weights.
    index = checkpoint / "model.safetensors.index.json"
    if len(files) > 1 and index.is_file():
        shutil.copyfile(index, folder / index.name)


def write_config(checkpoint: Path, folder: Path, needs: dict[str, "Need"], dtype: str) -> None:
    """config.json: that of the checkpoint, byte for byte where nothing is added."""
    check_files(checkpoint, [CONFIG])
    config = json.loads((checkpoint / CONFIG).read_text())
    extra = {f"{name}_fingerprint": need.fingerprint for name, need in needs.items() if need.fingerprint}
    if not extra and config.get("dtype") in (None, dtype):
        shutil.copyfile(checkpoint / CONFIG, folder / CONFIG)
        return
    known = sorted({*config.get("_extra_attributes", []), *extra})
    write_json(folder / CONFIG, {**config, **extra, "dtype": dtype, **({"_extra_attributes": known} if known else {})})


def portable(value: Any, start: str) -> Any:
    """A record whose paths below the folder `start`, in which the run was started, are relative to it."""
    if isinstance(value, dict):
        return {key: portable(item, start) for key, item in value.items() if key != "working_directory"}
    if isinstance(value, list):
        return [portable(item, start) for item in value]
    return value.removeprefix(f"{start}/") if start and isinstance(value, str) else value


def compare(folder: Path, kind: ExportedModel, model: nn.Module, dtype: DType) -> None:
    """Open the folder as a reader does. Raises: ValueError: it holds other weights than the model; names the first."""
    opened = kind.model_class.from_pretrained(folder, dtype=torch.float32)
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    for name, value in [*opened.named_parameters(), *opened.named_buffers()]:
        target = expected[name]
        if dtype != "float32" and isinstance(target, nn.Parameter):
            target = target.to(getattr(torch, dtype)).to(target.dtype)
        if not torch.equal(value, target):
            raise ValueError(f"{name} differs in the exported folder from {type(model).__name__} of the checkpoint")


# ---- Models that the exported one needs.


@dataclasses.dataclass(frozen=True)
class Need:
    """A model that another one needs: its fingerprint, and what the card says."""

    fingerprint: str
    description: str


def needed_models(checkpoint: Path, folder: Path, content: Content) -> dict[str, Need]:
    """What the model needs, by the subfolder that it is written to where the export has parts."""
    record, needs = read_stage(checkpoint), {}
    for place, media, latents in latents_of(record):
        fingerprint, where = latents["vae_fingerprint"], f"recorded as `{Path(latents['vae_checkpoint']).name}`"
        if content.with_parts:
            home = home_of(checkpoint) / place.removesuffix(PINNED).rstrip("/")
            near = (home, data_of(checkpoint)) if place == PINNED else (home,)
            given = content.vaes.get(media, "")
            vae = find_vae(latents, f"the latents of {checkpoint}", given=given, folders=near, media=media)
            write_folder(
                vae, folder / place, Content(f"{content.name}/{place}", format=content.format, license=content.license)
            )
            where = f"in `{place}`"
        name = place.replace("/", "_")
        needs[name] = Need(fingerprint, f"the {media} VAE with fingerprint `{fingerprint}`, {where}")
        # The frozen encoder of captions.
        if latents.get("text_encoder"):
            where = f"`{latents['text_encoder']}`"
            if content.with_parts:
                encoder = load_text_encoder(latents, content.text_encoder, near=checkpoint)
                assert encoder is not None
                encoder.model.save_pretrained(folder / TEXT_ENCODER)
                encoder.tokenizer.save_pretrained(folder / TEXT_ENCODER)
                where = f"in `{TEXT_ENCODER}`"
            fingerprint = latents["text_encoder_fingerprint"]
            needs[TEXT_ENCODER] = Need(fingerprint, f"the frozen text encoder, fingerprint `{fingerprint}`, {where}")
    if content.vocoder:
        write_folder_of_vocoder(Path(content.vocoder), folder / VOCODER, content)
        needs[VOCODER] = Need("", f"in `{VOCODER}`; used unless another one is named with `--vocoder_checkpoint`")
    return needs


def latents_of(record: dict[str, Any]) -> Iterator[tuple[str, Media, dict[str, Any]]]:
    """Place of the VAE below a run, what it encodes, and settings of its latents, for each VAE of a model."""
    stage, latents = record["stage"], record.get("latents") or {}
    media: tuple[Media, ...] = ("image", "audio")
    for name in media:
        if stage == f"{name}_diffusion":
            yield PINNED, name, latents
        elif stage == "multimodal" and name in latents:
            yield f"{name}/{PINNED}", name, latents[name]


def write_folder_of_vocoder(checkpoint: Path, folder: Path, content: Content) -> None:
    """The vocoder of a checkpoint. Raises: ValueError: it is of another stage."""
    load_vocoder(checkpoint)
    write_folder(checkpoint, folder, Content(f"{content.name}/{VOCODER}", license=content.license))
