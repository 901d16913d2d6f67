"""One transformer over text and images compared with transfusion-pytorch: CPU seconds, interleaved in one process.

    python benchmarks/multimodal.py                                                       # random latents: speed alone
    python benchmarks/multimodal.py --image_latents cached_datasets/scenes_latents --quality 60

Both sides have equally many parameters and read the same rows: a caption, then the 16 tokens of 64 values that an
image of 64 px has (latents 16 x 8 x 8 in patches of 2 x 2). A training step is forward, backward and AdamW. The peer
adds tokens of its own around an image, which are not counted. `--quality` trains both sides for so many CPU seconds
each, in turns, and prints the squared error of the flow on held-out images; a prediction of zero has about 2.
"""

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import interleave, report
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.text.tokenizers import document_encoder, train_bpe
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import Part, build_stream, image_tokens, join_streams
from model.multimodal.spans import Spans, spans_in
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

OURS, THEIRS = "ours", "transfusion"
VOCABULARY, N_TOKENS, WIDTH = 400, 16, 64
TIMES = (0.3, 0.5, 0.7, 0.9)  # Of the held-out error; 1 is noise.
Pair = tuple[list[int], Tensor]  # Tokens of a caption, and of its image (16, 64).


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    repeats: int = option(5, "interleaved repeats of each side", gt=0)
    batch_size: int = option(32, "rows of a training step", gt=0)
    image_latents: str = option("", "folder of image latents of 16 x 8 x 8 with captions; empty: random ones")
    quality: float = option(
        0.0, "CPU seconds of training of each side; 0: none", ge=0, only_with=("image_latents", bool)
    )
    held_out: int = option(96, "validation images that the error is measured on", gt=0, only_with=("quality", bool))
    bf16: bool = option(False, "bfloat16 autocast on both sides")
    seed: int = option(0, "seed of weights, rows and noise", ge=0)
    threads: int = option(1, "CPU threads", gt=0)


class Ours:
    """`multimodal-tiny` on text and images."""

    learning_rate, max_norm = 1.5e-3, 1.0

    def __init__(self):
        tokens = {"vocab_size": VOCABULARY + 3, "null_token_id": VOCABULARY, "image_begin_token_id": VOCABULARY + 1}
        audio = {f"audio_{name}_token_id": None for name in ("begin", "end", "length")}
        flows = {"audio_guidance_scale": 1.0, "audio_time_mean": 0.0, "audio_time_std": 1.0}
        fields = {**tokens, **audio, **flows, "image_end_token_id": VOCABULARY + 2, "modalities": ["text", "image"]}
        self.model: nn.Module = MegaTransformerMultimodal.from_preset("multimodal-tiny", **fields)

    def errors(self, pairs: Sequence[Pair], time: float | None = None) -> Tensor:
        """Squared errors of the flow's prediction, (B, 16, 64); in training at random times and with 10 % of the
        captions dropped."""
        model: Any = self.model
        config = model.config
        is_dropped = torch.rand(len(pairs)) < config.image_condition_dropout * (time is None)
        rows = [[config.null_token_id] if drop else ids for drop, (ids, _) in zip(is_dropped, pairs)]
        streams = [build_stream(config, [Part("text", ids=ids), Part("image", n_tokens=N_TOKENS)]) for ids in rows]
        batch, process = join_streams(streams, 0), model.processes["image"]
        clean = torch.stack([tokens for _, tokens in pairs])
        noise, times = torch.randn_like(clean), torch.full((len(pairs),), time or 0.0)
        if time is None:
            mean, std = config.image_time_mean, config.image_time_std
            times = process.training_times(torch.rand(len(pairs)), "logit_normal", mean=mean, std=std)
        numbers, _ = spans_in(streams, "image")
        spans = Spans(process.add_noise(clean, noise, times), times, torch.ones(len(pairs)) > 0, *numbers)
        output = model(batch.ids, batch.positions, batch.placement, spans={"image": spans})
        return (output.predictions["image"] - process.target(clean, noise, times)).square()

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """The loss of a training step."""
        return self.errors(pairs).mean()

    def held_out_error(self, pairs: Sequence[Pair], time: float) -> float:
        """Mean squared error of the flow at a time."""
        return self.errors(pairs, time).mean().item()


class Theirs:
    """transfusion-pytorch with as many parameters, its own losses, learning rate and clipping of its examples."""

    learning_rate, max_norm = 8e-4, 0.5

    def __init__(self):
        from transfusion_pytorch import Transfusion  # type: ignore[import-not-found]

        self.model: nn.Module = Transfusion(
            num_text_tokens=VOCABULARY,
            dim_latent=WIDTH,
            modality_default_shape=(4, 4),
            modality_num_dim=2,
            add_pos_emb=True,
            transformer={"dim": 148, "depth": 4, "dim_head": 64, "heads": 4},
        )

    def rows(self, pairs: Sequence[Pair]) -> list[list[Tensor]]:
        """Captions and images, channel last."""
        return [[torch.tensor(ids), tokens.view(4, 4, WIDTH)] for ids, tokens in pairs]

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """The loss of a training step."""
        return self.model(self.rows(pairs))

    def held_out_error(self, pairs: Sequence[Pair], time: float) -> float:
        """Mean squared error of the flow at a time, from its loss and that of a prediction of zero on the same noise,
        whose error is known: the loss is a sum over a number of tokens of its own."""
        keywords = {"times": torch.full((len(pairs), 1), 1 - time), "return_breakdown": True}  # Its time 1 is data.
        losses = []
        projections = [
            module for module in self.model.model_to_latent_projs.modules() if isinstance(module, nn.Linear)
        ]
        saved = [{name: value.clone() for name, value in module.state_dict().items()} for module in projections]
        for is_zero in (False, True):
            if is_zero:
                for module in projections:
                    for parameter in module.parameters():
                        parameter.data.zero_()
            torch.manual_seed(0)
            _, breakdown = self.model(self.rows(pairs), **keywords)
            losses.append(breakdown.flow[0].item())
        for module, values in zip(projections, saved):
            module.load_state_dict(values)
        clean = torch.stack([tokens for _, tokens in pairs])
        return losses[0] / losses[1] * (1 + clean.square().mean().item())


def read_pairs(args: BenchmarkArguments) -> dict[str, list[Pair]]:
    """Captions and images of both splits."""
    if not args.image_latents:
        lengths = torch.randint(6, 13, (args.batch_size * 8,)).tolist()
        rows = [(torch.randint(2, VOCABULARY, (n,)).tolist(), torch.randn(N_TOKENS, WIDTH)) for n in lengths]
        return {"train": rows, "validation": []}
    caches = {split: ImageLatentDataset(args.image_latents, split) for split in ("train", "validation")}
    tokenizer = train_bpe(sorted({entry["caption"] for entry in caches["train"].entries}), VOCABULARY)
    encoder, pairs = document_encoder(tokenizer), {}
    for split, cache in caches.items():
        ids = [encoding.ids for encoding in encoder.encode_batch([entry["caption"] for entry in cache.entries])]
        pairs[split] = [(row, image_tokens(cache[number]["mean"].float(), 2)) for number, row in enumerate(ids)]
    return pairs


def stepper(side: Ours | Theirs, pairs: list[Pair], args: BenchmarkArguments) -> Callable[[], None]:
    """Training steps on random rows, the same ones on both sides."""
    generator, step = torch.Generator().manual_seed(args.seed), 0
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=side.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def run() -> None:
        nonlocal step
        step += 1
        optimizer.param_groups[0]["lr"] = side.learning_rate * min(1.0, step / 20)
        chosen = torch.randint(len(pairs), (args.batch_size,), generator=generator).tolist()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = side.loss([pairs[number] for number in chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(side.model.parameters(), side.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def quality(sides: dict[str, Ours | Theirs], pairs: dict[str, list[Pair]], args: BenchmarkArguments) -> None:
    """Train both sides for equal CPU time, in turns of ten steps, and measure them on held-out images."""
    runs = {name: stepper(side, pairs["train"], args) for name, side in sides.items()}
    spent, steps = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    while min(spent.values()) < args.quality:
        name = min(spent, key=spent.__getitem__)
        start = time.process_time()
        for _ in range(10):
            runs[name]()
        steps[name] += 10
        spent[name] += time.process_time() - start
    held_out = pairs["validation"][:: max(1, len(pairs["validation"]) // args.held_out)][: args.held_out]
    for name, side in sides.items():
        side.model.eval()
        errors = []
        for moment in TIMES:
            torch.manual_seed(args.seed)
            with torch.no_grad():
                errors.append(side.held_out_error(held_out, moment))
        shown = ", ".join(f"t={moment:g} {error:.3f}" for moment, error in zip(TIMES, errors))
        mean = sum(errors) / len(errors)
        print(
            f"{name:12} {spent[name]:.0f} CPU s, {steps[name]} steps: held-out error {mean:.3f} ({shown})", flush=True
        )


def compare(args: BenchmarkArguments) -> None:
    """Speed, then quality where it is asked for."""
    torch.manual_seed(args.seed)
    pairs = read_pairs(args)
    sides: dict[str, Ours | Theirs] = {OURS: Ours(), THEIRS: Theirs()}
    for name, side in sides.items():
        print(f"{name}: {sum(parameter.numel() for parameter in side.model.parameters()):,} parameters")
    runs = {name: stepper(side, pairs["train"], args) for name, side in sides.items()}
    times = interleave(runs, args.repeats)
    report(f"{'bf16' if args.bf16 else 'fp32'} training step", times)
    n_tokens = sum(len(ids) + N_TOKENS for ids, _ in pairs["train"]) / len(pairs["train"]) * args.batch_size
    for name, seconds in times.items():
        print(f"{name:12} {n_tokens / sorted(seconds)[len(seconds) // 2]:,.0f} tokens per CPU second (median)")
    if args.quality:
        torch.manual_seed(args.seed)
        quality({OURS: Ours(), THEIRS: Theirs()}, pairs, args)


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), load {os.getloadavg()[0]:.1f}")
    with explained_errors(logging.getLogger("benchmark")):
        compare(arguments)
