"""Parts of `benchmarks/cuda.py`: generation of text, multimodal steps, and which batch fits which memory."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.transformer import SIDES, Shape
from benchmarks.timing import ResultRows, free_memory, measure
from benchmarks.transformer import LARGE
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.image.vae import ImageVAE
from model.language_head import next_token_targets
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import Part, build_stream, join_streams, target_places
from model.multimodal.spans import Spans, spans_in

SMALL_SHAPE = Shape(hidden_size=32, n_layers=1, n_heads=2, n_query_groups=2, intermediate_size=64, vocab_size=64)
LIMITS = (24, 40, 80)  # GiB of the GPUs that are asked about.
OVERHEAD = 1.5  # GiB of a GPU that the driver, cuBLAS and fragments take.


def compare_generation(results: ResultRows) -> None:
    """Greedy tokens after prompts of 128 tokens, one alone and 32: 300 M parameters, ours and Llama, bf16."""
    shape, n_prompt, n_new = results.size((LARGE, 128, 128), (SMALL_SHAPE, 8, 4))
    for name in ("ours", "llama"):
        side = SIDES[name](shape)
        side.model.to(results.device, torch.bfloat16).eval()
        for B in (1, results.size(32, 2)):
            prompt = torch.randint(1, shape.vocab_size, (B, n_prompt), device=results.device)
            mask = torch.ones_like(prompt)

            def run(side=side, prompt=prompt, mask=mask) -> Tensor:
                with torch.no_grad():
                    return side.generate(prompt, mask, n_new)

            results.add(f"generation, {B} x {n_new} tokens, bf16", name, run, unit="tokens", n_units=B * n_new)
        del side
        free_memory()


def multimodal_step(model: MegaTransformerMultimodal, B: int, *, device: torch.device) -> Callable[[], None]:
    """Forward and backward on B rows of a caption of 16 tokens, an image and 8 tokens of audio, in bf16."""
    config, m = model.config, model.config.image_n_tokens
    parts = [Part("text", range(2, 18)), Part("image", n_tokens=m), Part("audio", n_tokens=8)]
    streams = [build_stream(config, parts) for _ in range(B)]
    batch, spans = join_streams(streams, 0), {}
    for name in ("image", "audio"):
        sizes, places = spans_in(streams, name)
        is_noisy = torch.tensor([place.is_noisy for _, place in places])
        fields = (torch.randn(len(places), int(sizes[0].max()), config.token_width(name)), is_noisy * 0.5, is_noisy)
        copies = is_noisy.nonzero()[:, 0].to(device)
        spans[name] = Spans(*(field.to(device) for field in (*fields, *sizes)), copies=copies)
    places = {name: p.to(device) for name, p in target_places(config, next_token_targets(batch.labels)).items()}
    placement = type(batch.placement)(*(vector.to(device) for vector in batch.placement))
    ids, positions, labels = (tensor.to(device) for tensor in (batch.ids, batch.positions, batch.labels))

    def run() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            output = model(ids, positions, placement, spans=spans, labels=labels, target_places=places)
        flows = sum(prediction.float().square().mean() for prediction in output.predictions.values())
        (output.text_loss + output.begin_loss + output.length_loss + flows).backward()

    return run


def measure_multimodal(results: ResultRows) -> None:
    """Training steps of the presets on text, images and audio in one stream."""
    B = results.size(64, 1)
    for name in results.size(("multimodal-tiny", "multimodal-small"), ("multimodal-tiny",)):
        model = MegaTransformerMultimodal.from_preset(name).to(results.device)
        step = multimodal_step(model, B, device=results.device)
        results.add(f"multimodal step, {B} streams", name, step, unit="streams", n_units=B)
        del model
        free_memory()


def training_memory(model: nn.Module, forward: Callable[[int], Tensor], B: int) -> dict[str, float]:
    """Time and peak memory of two whole steps with AdamW and averaged weights, on B samples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=torch.cuda.is_available() or None)
    average = copy.deepcopy(list(model.parameters()))

    def run() -> None:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            loss = forward(B)
        loss.float().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_([mean.data for mean in average], [weight.data for weight in model.parameters()], 1e-3)

    return measure(run, 2, n_warm=1)


def workloads(results: ResultRows) -> dict[str, tuple[Callable[[], Any], Callable[[Any, int], Tensor]]]:
    """Name -> the model, and its loss on B samples of the size that its presets are made for."""
    device, side = results.device, results.size(256, 32)

    def image_loss(model: ImageVAE, B: int) -> Tensor:
        output = model(image=torch.zeros(B, 3, side, side, device=device))
        return output.reconstruction.float().mean() + output.mean.mean()

    def latent_loss(model: ImageDiffusion, B: int) -> Tensor:
        config = model.config
        latents = torch.zeros(B, config.latent_channels, config.latent_size, config.latent_size, device=device)
        tokens = torch.ones(B, 32, dtype=torch.int64, device=device)
        return model(latents, torch.full((B,), 0.5, device=device), tokens=tokens, mask=tokens > 0).prediction.mean()

    def text_loss(model: MegaTransformerForCausalLM, B: int) -> Tensor:
        tokens = torch.ones(B, results.size(1024, 16), dtype=torch.int64, device=device)
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def mel_loss(model: AudioVAE, B: int) -> Tensor:
        mel = torch.zeros(B, model.config.n_mels, results.size(512, 16), device=device)
        return model(mel=mel).reconstruction.mean()

    def waveform_loss(model: Vocoder, B: int) -> Tensor:
        return model(mel=torch.zeros(B, model.config.mel.n_mels, results.size(64, 16), device=device)).mean()

    kinds: dict[str, tuple[Any, Callable[..., Tensor], tuple[str, ...], dict]] = {
        "image VAE": (
            ImageVAE,
            image_loss,
            results.size(("small", "medium", "large", "ldm"), ("tiny",)),
            {"image_size": side},
        ),
        "image diffusion": (ImageDiffusion, latent_loss, results.size(("small", "medium"), ("tiny",)), {}),
        "audio VAE": (AudioVAE, mel_loss, results.size(("small", "medium"), ("tiny",)), {}),
        "vocoder": (Vocoder, waveform_loss, results.size(("small", "medium"), ("tiny",)), {}),
        "transformer": (
            MegaTransformerForCausalLM,
            text_loss,
            results.size(("medium", "large", "recurrent-medium"), ("tiny",)),
            {"loss_chunk_size": 4096},
        ),
    }
    return {
        f"{kind} {preset}": (lambda c=model_class, p=preset, f=fields: c.from_preset(p, **f), loss)
        for kind, (model_class, loss, presets, fields) in kinds.items()
        for preset in presets
    }


def measure_batches(results: ResultRows) -> None:
    """The largest batch, a power of two, of a training step without adversary that fits 24, 40 and 80 GiB, in bf16."""
    for what, (build, loss) in workloads(results).items():
        largest, B = dict.fromkeys(LIMITS, 0), 1
        model = build().to(results.device).train()
        while results.size(1024, 2) >= B:
            try:
                row = training_memory(model, lambda B, model=model, loss=loss: loss(model, B), B)
            except torch.cuda.OutOfMemoryError:
                break
            fitting = [limit for limit in LIMITS if row["peak_gib"] + OVERHEAD <= limit]
            largest |= dict.fromkeys(fitting, B)
            results.rows.append({"what": what, "batch_size": B, **row, "samples_per_s": B / row["median_s"]})
            if not fitting:
                break
            B *= 2
        print(f"{what:34} " + ", ".join(f"{limit} GiB: {batch}" for limit, batch in largest.items()), flush=True)
        results.rows.append({"what": what, **{f"batch_size_{limit}_gib": batch for limit, batch in largest.items()}})
        del model
        free_memory()
