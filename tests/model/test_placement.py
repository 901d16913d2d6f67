"""Every model and loss computes where its parameters and inputs are: on a GPU that is only pretended, without values,
and on a device of its own with the numbers of the CPU, forward and backward, where the host waits for nothing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from model.audio.diffusion import AudioDiffusion
from model.audio.griffin_lim import griffin_lim
from model.audio.mel_criteria import MelLoss, character_loss
from model.audio.mel_discriminators import build_mel_discriminator
from model.audio.spectral import LogMel, MelSettings
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.audio.waveform_criteria import VocoderLoss
from model.audio.waveform_discriminators import build_waveform_discriminator
from model.causal import MegaTransformerForCausalLM
from model.criteria import (
    ReconstructionLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    kl_divergence,
    lecam_penalty,
    r1_penalty,
)
from model.image.augmentation import diff_augment
from model.image.diffusion import ImageDiffusion
from model.image.discriminators import build_discriminator
from model.image.feature_extractors import build_perceptual
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.language_head import next_token_targets
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import Part, build_stream, join_streams, target_places
from model.multimodal.spans import Spans, spans_in
from tests.helpers.speech_batch import collate, speech_clips
from tests.helpers.stand_in_device import DEVICE, stand_in_device

MEL = MelSettings(sample_rate=16000, n_fft=256, hop_length=64, n_mels=40)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A module, its inputs on the CPU, and how it is called; by default `module(**inputs)`."""

    build: Callable[[], Any]
    inputs: Callable[[Any], Any]
    call: Callable[[Any, Any], Any] = lambda module, inputs: module(**inputs)
    trains: bool = True
    has_fake: bool = True  # Griffin-Lim computes its matrices by values.


def images(**more: Tensor) -> Callable[[Any], dict]:
    return lambda model: {"image": numbers(2, 3, 32, 32), **more}


def latents_and_captions(model: ImageDiffusion) -> dict:
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    latents = numbers(2, model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    drop = torch.tensor([True, False])
    return {"latents": latents, "time": torch.tensor([0.2, 0.9]), "tokens": mask * 7, "mask": mask, "drop": drop}


def speech(model: AudioDiffusion) -> dict:
    batch = collate(speech_clips(n_channels=model.config.latent_channels, compression=model.config.compression))
    drop, keys = torch.tensor([True, False, False]), torch.tensor([3, 4, 5])
    names = ("latents", "n_latent_frames", "tokens", "n_tokens", "durations")
    fields = {name: batch[name] for name in names}
    return {**fields, "time": torch.tensor([0.1, 0.5, 0.9]), "drop": drop, "dropout_keys": keys}


def captions(model: AudioDiffusion) -> dict:
    texts = {"caption_states": torch.full((2, 6), 9), "n_caption": torch.tensor([6, 3])}
    latents = numbers(2, 12, model.config.latent_channels)
    return {"latents": latents, "time": torch.tensor([0.1, 0.9]), "n_latent_frames": torch.tensor([12, 7]), **texts}


def tokens(model: Any, **more: Any) -> dict:
    ids = torch.arange(2 * 12).view(2, 12) % 50
    return {"input_ids": ids, "labels": ids, "use_cache": False, **more}


def streams(model: MegaTransformerMultimodal) -> dict:
    """Rows of text, an image and audio with noise copies, as the trainer gives them."""
    config, m = model.config, model.config.image_n_tokens
    rows = [
        [Part("text", [30, 31]), Part("image", n_tokens=m)],
        [Part("text", [32]), Part("audio", n_tokens=5), Part("audio", n_tokens=3)],
    ]
    built = [build_stream(config, parts) for parts in rows]
    batch, spans = join_streams(built, 0), {}
    for name in ("image", "audio"):
        sizes, places = spans_in(built, name)
        is_noisy = torch.tensor([place.is_noisy for _, place in places])
        latents = numbers(len(places), int(sizes[0].max()), config.token_width(name))
        spans[name] = Spans(latents, is_noisy * 0.4, is_noisy, *sizes, copies=is_noisy.nonzero()[:, 0])
    places = target_places(config, next_token_targets(batch.labels))
    given = {"input_ids": batch.ids, "position_ids": batch.positions, "placement": batch.placement}
    keys = torch.tensor([5, 6])
    return {**given, "spans": spans, "labels": batch.labels, "target_places": places, "dropout_keys": keys}


def play(discriminator: nn.Module, inputs: dict) -> Tensor:
    """All losses of a discriminator and of its generator."""
    (real, real_maps), (fake, fake_maps) = discriminator(inputs["real"]), discriminator(inputs["fake"])
    losses = [discriminator_loss(kind, real, fake) for kind in ("hinge", "non_saturating", "least_squares")]
    losses += [generator_loss("hinge", fake), feature_matching_loss(real_maps, fake_maps)]
    losses += [lecam_penalty(real, fake, ema_real=torch.tensor(0.1), ema_fake=torch.tensor(-0.1))]
    if torch.is_grad_enabled() and not isinstance(inputs["real"], torch._subclasses.FakeTensor):
        losses.append(r1_penalty(discriminator, inputs["real"]))
    return torch.stack(losses)


def pair(*shape: int) -> Callable[[Any], dict]:
    return lambda module: {"real": numbers(*shape), "fake": numbers(*shape, seed=1)}


def ctc(module: nn.Module, inputs: dict) -> Tensor:
    """With the module's parameter as what the logits depend on."""
    lengths = {name: inputs[name] for name in ("lengths", "tokens", "token_lengths")}
    return character_loss(module(inputs["states"]), lengths.pop("lengths"), lengths.pop("tokens"), **lengths)


AUDIO = {"n_mels": 40, "width": 16, "latent_channels": 5, "n_encoder_blocks": 1, "n_decoder_blocks": 1}
CLIPS = {"mel": numbers(2, 40, 14), "n_frames": torch.tensor([14, 9])}
SMALL_UNET = {"widths": [16, 32], "n_blocks": [1, 1], "conditioning_width": 16}
TEXT = {"hidden_size": 32, "n_heads": 2, "n_query_groups": 1, "vocab_size": 60}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
KEYS = {"dropout_keys": torch.tensor([1, 2])}
RECURRENT = {**TEXT, "n_recurrent_layers": 1, "recurrent_mean_thinking_steps": 2}
SEGMENTS = {"segment_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 12])}
PADDED = {"attention_mask": torch.tensor([[0] * 5 + [1] * 7, [1] * 12])}
SOUND = {
    **SMALL_UNET,
    "latent_channels": 6,
    "compression": 2,
    "n_attentions": [0, 1],
    "head_width": 8,
    "text_width": 16,
}
SPEECH = {**SOUND, "n_symbols": 12, "frame_width": 16, "pause_symbols": [0, 5]}


def mel_discriminator(kind: str) -> nn.Module:
    return build_mel_discriminator(kind, torch.zeros(40), torch.ones(40), channels=8, n_layers=2)  # type: ignore


def text(preset: str, fields: dict, **more: Any) -> Case:
    return Case(lambda: MegaTransformerForCausalLM.from_preset(preset, **fields), lambda model: tokens(model, **more))


CASES = {
    "image_vae": Case(lambda: ImageVAE.from_preset("tiny", image_size=32), images(noise=numbers(2, 16, 4, 4))),
    "recurrent_vae": Case(
        lambda: RecurrentVAE.from_preset("tiny", image_size=32),
        lambda model: {"image": numbers(2, 3, 32, 32), "n_steps": 3, "n_backprop_steps": 2},
    ),
    "image_diffusion": Case(
        lambda: ImageDiffusion.from_preset("tiny", **SMALL_UNET, text_width=32, latent_size=4), latents_and_captions
    ),
    "vocoder": Case(lambda: Vocoder.from_preset("tiny", width=16, n_layers=1), lambda m: {"mel": numbers(2, 80, 12)}),
    "hifigan": Case(lambda: Vocoder.from_preset("hifigan-v2", hifigan_width=32), lambda m: {"mel": numbers(1, 80, 4)}),
    "audio_vae": Case(lambda: AudioVAE.from_preset("tiny", **AUDIO, use_ctc=True), lambda model: CLIPS),
    "audio_vae_2d": Case(
        lambda: AudioVAE.from_preset("tiny-2d", **AUDIO, speakers=["a", "b"]),
        lambda model: {**CLIPS, "speaker": torch.tensor([0, 1])},
    ),
    "speech": Case(lambda: AudioDiffusion.from_preset("tiny", **SPEECH), speech),
    "captions": Case(lambda: AudioDiffusion.from_preset("tiny", **SOUND, conditioning="caption"), captions),
    "text": text("tiny", {**TEXT, "n_layers": 1, **DROPOUT}, **SEGMENTS, **KEYS),
    "padded_text": text("tiny", {**TEXT, "n_layers": 1}, **PADDED),
    "alibi": text("tiny", {**TEXT, "n_layers": 1, "use_alibi_bias": True, "use_rotary_embedding": False}),
    "text_in_chunks": text("tiny", {**TEXT, "n_layers": 1, "loss_chunk_size": 8}, n_targets=torch.tensor(9.0)),
    "recurrent_text": text("recurrent-tiny", {**RECURRENT, **DROPOUT}, **SEGMENTS, **KEYS, n_thinking_steps=3),
    "multimodal": Case(
        lambda: MegaTransformerMultimodal.from_preset(
            "multimodal-tiny", hidden_size=32, head_width=16, n_heads=2, n_layers=1, image_size=32, hidden_dropout=0.1
        ),
        streams,
    ),
    "log_mel": Case(lambda: LogMel(MEL), lambda m: {"waveform": numbers(2, 1024)}, trains=False),
    "griffin_lim": Case(
        lambda: LogMel(MEL),
        lambda m: {"mel": numbers(1, 40, 8) - 4},
        lambda m, i: griffin_lim(i["mel"], MEL, 2),
        False,
        False,
    ),
    # Discriminators and losses.
    "patch": Case(lambda: build_discriminator("patch", 8, 2), pair(2, 3, 32, 32), play),
    "multi_scale": Case(
        lambda: build_discriminator("multi_scale", 8, 2, use_spectral_norm=True), pair(2, 3, 32, 32), play
    ),
    "waveform": Case(
        lambda: build_waveform_discriminator("thin", periods=[2, 3], resolutions=[256]), pair(1, 2048), play
    ),
    "mel_1d": Case(lambda: mel_discriminator("patch_1d"), pair(2, 40, 16), play),
    "mel_2d": Case(lambda: mel_discriminator("patch_2d"), pair(2, 40, 16), play),
    "mel_loss": Case(
        lambda: MelLoss(l1_weight=1, l2_weight=1, gradient_weight=1),
        lambda m: {
            "reconstruction": numbers(2, 40, 9),
            "target": numbers(2, 40, 9, seed=1),
            "n_frames": torch.tensor([9, 4]),
        },
    ),
    "vocoder_loss": Case(
        lambda: VocoderLoss(MEL, mel_weight=1, stft_weight=1, phase_weight=1),
        lambda m: {"fake": numbers(2, 4096), "real": numbers(2, 4096, seed=1)},
    ),
    "reconstruction_loss": Case(
        lambda: ReconstructionLoss(
            l1_weight=1, gradient_weight=1, perceptual_weight=1, perceptual=build_perceptual("efficientnet")
        ),
        lambda m: {"reconstruction": numbers(2, 3, 64, 64).tanh(), "target": numbers(2, 3, 64, 64, seed=1).tanh()},
    ),
    "augmentation": Case(
        nn.Identity,
        lambda m: {
            "x": numbers(2, 3, 16, 16),
            "uniforms": torch.rand(2, 8, generator=torch.Generator().manual_seed(0)),
        },
        lambda m, i: diff_augment(i["x"], i["uniforms"], policy=["color", "translation", "cutout"]),
    ),
    "kl": Case(
        nn.Identity,
        lambda m: {"a": numbers(2, 4, 3, 3), "b": numbers(2, 4, 3, 3)},
        lambda m, i: kl_divergence(i["a"], i["b"]),
    ),
}


def prepared(name: str) -> tuple[Any, Any, Case]:
    """Module in training mode and inputs of a case, on the CPU."""
    case = CASES[name]
    torch.manual_seed(0)
    module = case.build().train()
    return module, case.inputs(module), case


def outputs(result: Any) -> list[Tensor]:
    """All floating-point tensors of an output."""
    return [
        leaf
        for leaf in tree_leaves(
            dict(result)
            if hasattr(result, "keys")
            else vars(result)
            if hasattr(result, "__dict__") and not isinstance(result, Tensor)
            else result
        )
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


@contextlib.contextmanager
def fake_gpu(module: nn.Module) -> Iterator[FakeTensorMode]:
    """Parameters and buffers without values on a GPU that need not exist."""
    with FakeTensorMode() as mode:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(mode.from_tensor(parameter), device="cuda")
                    part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty_like(mode.from_tensor(buffer), device="cuda")
        yield mode


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_fake])
def test_on_a_gpu_without_values(name):
    """Mixtures of devices and decisions by values raise."""
    module, inputs, case = prepared(name)
    with fake_gpu(module) as mode:
        moved = tree_map_only(
            Tensor,
            lambda tensor: mode.from_tensor(tensor).to("cuda") if tensor.ndim else mode.from_tensor(tensor),
            inputs,
        )
        results = outputs(case.call(module, moved))
    assert results and all(result.device.type == "cuda" for result in results)


@pytest.mark.parametrize("name", CASES)
def test_on_a_device_of_its_own(name):
    """Results and gradients are those of the CPU, and nothing is read or copied meanwhile."""

    def run(module, inputs) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        results = outputs(case.call(module, inputs))
        if not case.trains or not any(result.requires_grad for result in results):
            return results, []
        sum(result.float().square().mean() for result in results if result.requires_grad).backward()
        return results, [parameter.grad for parameter in module.parameters() if parameter.grad is not None]

    module, inputs, case = prepared(name)
    expected = [[tensor.detach().clone() for tensor in tensors] for tensors in run(module, inputs)]
    module, inputs, case = prepared(name)
    with stand_in_device() as notes:
        module.to(DEVICE)
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), inputs)
        notes.clear()
        results = run(module, inputs)
        waits = dict(notes)
        values = [[tensor.detach().cpu() for tensor in tensors] for tensors in results]
    assert waits == {}
    for first, second in zip(expected, values, strict=True):
        for on_cpu, on_device in zip(first, second, strict=True):
            assert (on_cpu - on_device).abs().max() <= 1e-4 * on_cpu.abs().max() + 1e-6
