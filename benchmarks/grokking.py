"""Grokking of arithmetic modulo a prime, with and without GrokFast: memorisation first, generalisation later.

    python benchmarks/grokking.py --image docs/grokking.png    # 2 x 3 runs, one thread, about half an hour

A transformer of two layers is trained on half of all pairs (a, b) to predict (a * b) mod p. Accuracy is measured on
the held-out pairs (arXiv 2201.02177). GrokFast-EMA (arXiv 2405.20233, `utils/optimizer_hooks.py`) is attached to the
same optimizer. All else is equal: weights, batches and split are determined by the seed. The defaults are close to the
setting of GrokFast: embeddings with a large std, post-norm, and Adam with weight decay as part of the gradient.
"""

import dataclasses
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.causal import MegaTransformerForCausalLM
from utils.command_line import explained_errors, parse_arguments
from utils.optimizer_hooks import GradientEMA
from utils.options import option

PLAIN, FAST = "without GrokFast", "with GrokFast-EMA"
COLORS = {PLAIN: (38, 84, 190), FAST: (214, 96, 22)}
WIDTH, HEIGHT, MARGIN = 640, 360, 48  # of the plot, in pixels


@dataclasses.dataclass
class GrokkingArguments:
    """Flags of the comparison."""

    operation: Literal["multiplication", "addition"] = option("multiplication", "operation to learn")
    modulus: int = option(97, "prime p; there are p x p pairs, (p - 1) x (p - 1) without zeros for products", gt=2)
    train_fraction: float = option(0.5, "fraction of the pairs in the training set", gt=0, lt=1)
    hidden_size: int = option(128, "width of the model", gt=0)
    norms: Literal["post", "pre"] = option("post", "layer norms after or before the branches")
    embedding_std: float = option(1.0, "std of the initial embeddings", gt=0)
    batch_size: int = option(512, "pairs per step, sampled with replacement", gt=0)
    optimizer: Literal["adam", "adamw"] = option(
        "adam", "optimizer; weight decay in the gradient (adam), or decoupled (adamw)"
    )
    learning_rate: float = option(1e-3, "learning rate after 10 steps of warm-up; betas are 0.9 and 0.98", gt=0)
    weight_decay: float = option(0.005, "weight decay of the optimizer", ge=0)
    grokfast_alpha: float = option(0.98, "decay of the gradient average", ge=0, lt=1)
    grokfast_lambda: float = option(2.0, "weight of the gradient average", gt=0)
    max_steps: int = option(5000, "maximum number of steps of a run", gt=0)
    goal: float = option(0.95, "accuracy on unseen pairs at which a run ends", gt=0, le=1)
    eval_steps: int = option(50, "steps between measurements", gt=0)
    n_seeds: int = option(3, "runs per optimizer setting", gt=0)
    image: str = option("", "image file of the curves; empty: none", aliases=("picture",))


@dataclasses.dataclass
class Run:
    """Accuracies of one run on training (`seen`) and held-out (`unseen`) pairs, by step."""

    steps: list[int] = dataclasses.field(default_factory=list)
    seen: list[float] = dataclasses.field(default_factory=list)
    unseen: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def first(self, accuracies: list[float], goal: float) -> int | None:
        """The first measured step with an accuracy of at least the goal; None if there is none."""
        return next((step for step, accuracy in zip(self.steps, accuracies) if accuracy >= goal), None)


def build(args: GrokkingArguments) -> MegaTransformerForCausalLM:
    """A model of two layers. Tokens are the numbers, the operation and the equals sign."""
    is_post = args.norms == "post"
    return MegaTransformerForCausalLM.from_preset(
        "tiny",
        n_layers=2,
        hidden_size=args.hidden_size,
        n_query_groups=None,
        norm_type="layernorm",
        use_norm_bias=True,
        use_pre_attention_norm=not is_post,
        use_pre_ffn_norm=not is_post,
        use_post_attention_norm=is_post,
        use_post_ffn_norm=is_post,
        use_final_norm=not is_post,
        use_qk_norm=False,
        # Learned positions, biases and GELU, as in the setting of GrokFast.
        use_rotary_embedding=False,
        position_embedding="learned",
        use_attention_bias=True,
        use_ffn_bias=True,
        ffn_activation="gelu",
        embedding_initializer_range=args.embedding_std,
        initializer_range=0.05,
        use_depth_scaled_initialization=False,
        vocab_size=args.modulus + 2,
        max_position_embeddings=4,  # a, operation, b, =
        pad_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=False,
    )


def all_pairs(p: int, operation: str) -> tuple[Tensor, Tensor]:
    """Tokens [a, operation, b, =] of all N pairs, (N, 4), and their results modulo p, (N,); no zeros in products."""
    # Products with 0 are all 0, which would be trivial to predict.
    numbers = torch.arange(p) if operation == "addition" else torch.arange(1, p)
    first, second = torch.cartesian_prod(numbers, numbers).unbind(1)
    results = first + second if operation == "addition" else first * second
    # Token p is the operation, token p + 1 the equals sign.
    tokens = [first, torch.full_like(first, p), second, torch.full_like(first, p + 1)]
    return torch.stack(tokens, dim=1), results % p


def train(args: GrokkingArguments, seed: int, is_fast: bool) -> Run:
    """One run, which ends when the accuracy on unseen pairs reaches the goal."""
    # Split, model and optimizer, all determined by the seed.
    torch.manual_seed(seed)
    tokens, results = all_pairs(args.modulus, args.operation)
    order = torch.randperm(len(tokens))
    seen, unseen = order.split([n_seen := round(args.train_fraction * len(tokens)), len(tokens) - n_seen])
    model = build(args)
    settings = {"betas": (0.9, 0.98), "weight_decay": args.weight_decay, "fused": True}
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=args.learning_rate, **settings)
    if is_fast:
        GradientEMA(args.grokfast_alpha, args.grokfast_lambda).attach(optimizer)

    # Logits of the last position, (B, V).
    def logits(rows: Tensor) -> Tensor:
        return model(input_ids=tokens[rows], use_cache=False, logits_to_keep=1).logits[:, -1]

    # Training steps with a linear warm-up, and the accuracy of both splits at intervals.
    run, start = Run(), time.process_time()
    for step in range(1, args.max_steps + 1):
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, step / 10)
        # A batch of training pairs, drawn with replacement; the loss is that of the last position.
        rows = seen[torch.randint(n_seen, (args.batch_size,))]
        optimizer.zero_grad()
        F.cross_entropy(logits(rows), results[rows]).backward()
        optimizer.step()
        if step % args.eval_steps == 0:
            with torch.no_grad():
                accuracies = [
                    (logits(split).argmax(-1) == results[split]).float().mean().item() for split in (seen, unseen)
                ]
            run.steps.append(step)
            run.seen.append(accuracies[0])
            run.unseen.append(accuracies[1])
            if accuracies[1] >= args.goal:  # has generalised
                break
    run.seconds = time.process_time() - start
    return run


def report(args: GrokkingArguments, runs: dict[str, list[Run]]) -> None:
    """Print the steps to the goal on seen and on unseen pairs."""
    for name, repeats in runs.items():
        for split in ("seen", "unseen"):
            steps = [run.first(getattr(run, split), args.goal) for run in repeats]
            shown = ", ".join(str(step) if step else f"more than {args.max_steps}" for step in steps)
            median = statistics.median(step or args.max_steps for step in steps)
            print(f"{name:24} {args.goal:.0%} of {split:6} pairs after steps {shown}; median {median:g}")
        print(f"{name:24} {sum(run.seconds for run in repeats):.0f} CPU s in total")


def draw(args: GrokkingArguments, runs: dict[str, list[Run]]) -> Image.Image:
    """Accuracy over steps: unseen pairs as thick lines, seen pairs as thin ones, one line per seed."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    last = max(run.steps[-1] for repeats in runs.values() for run in repeats)
    across, down = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    # Step and accuracy -> pixels.
    def place(step: float, accuracy: float) -> tuple[float, float]:
        return MARGIN + across * step / last, HEIGHT - MARGIN - down * accuracy

    # Grid with labels on both axes.
    for share in (0, 0.25, 0.5, 0.75, 1):
        canvas.line([place(0, share), place(last, share)], (220, 220, 220))
        canvas.text((8, place(0, share)[1] - 8), f"{share:.0%}", "black", font)
        canvas.text((place(share * last, 0)[0] - 12, HEIGHT - MARGIN + 6), f"{share * last:.0f}", "black", font)
    # One pair of curves per run, and the legend.
    for row, (name, repeats) in enumerate(runs.items()):
        for run in repeats:
            for accuracies, width in ((run.seen, 1), (run.unseen, 3)):
                points = [place(0, 0), *(place(*point) for point in zip(run.steps, accuracies))]
                canvas.line(points, COLORS[name], width)
        canvas.text((MARGIN, 4 + 16 * row), name, COLORS[name], font)
    rule = f"accuracy over steps, {args.operation} mod {args.modulus}; thick: unseen pairs, thin: seen pairs"
    canvas.text((MARGIN, HEIGHT - 20), rule, "black", font)
    return image


if __name__ == "__main__":
    arguments = parse_arguments(GrokkingArguments, None, __doc__ or "")
    torch.set_num_threads(1)
    with explained_errors(logging.getLogger("benchmark")):
        results: dict[str, list[Run]] = {PLAIN: [], FAST: []}
        for seed_number in range(arguments.n_seeds):
            for kind in results:
                results[kind].append(train(arguments, seed_number, kind == FAST))
        report(arguments, results)
        if arguments.image:
            draw(arguments, results).save(arguments.image, optimize=True)
