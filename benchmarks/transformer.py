"""The causal transformer compared with transformers' Llama, litgpt and x-transformers, interleaved in one process.

    python benchmarks/transformer.py                                    # 8.5 M parameters, 2 CPU threads
    python benchmarks/transformer.py --measure generation --repeats 9   # one part only
    python benchmarks/transformer.py --device cuda --peak_tflops 989    # 300 M parameters: share of the GPU's peak

Training is forward and backward of the mean cross-entropy, without optimizer, in tokens per second. `compiled`
compiles each layer separately, in the same way on all sides. Generation is greedy, with a cache, in fp32. Memory is
the peak of a separate process that runs two training steps. The recurrent model is compared with itself, with and
without early exit. Ratios above 1 are in our favour, except for memory.
"""

import dataclasses
import logging
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.transformer import SIDES, Shape
from model.causal import MegaTransformerForCausalLM
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

OURS, THEIRS = "ours", "llama"
LARGE = Shape(
    hidden_size=1024,
    n_layers=24,
    n_heads=16,
    n_query_groups=4,
    intermediate_size=2752,
    vocab_size=32000,
    is_tied=True,
)


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    measure: list[Literal["training", "compiled", "generation", "memory", "recurrent"]] = option(
        ["training", "compiled", "generation", "memory", "recurrent"], "measurements, in this order"
    )
    sides: list[Literal["ours", "llama", "litgpt", "x-transformers"]] = option(
        [*SIDES], "models that are compared; ours first"
    )
    repeats: int = option(5, "interleaved repeats of each side", gt=0)
    batch_size: int = option(4, "sequences per training step", gt=0)
    sequence_length: int = option(512, "tokens of a sequence", gt=1)
    n_prompt: int = option(32, "tokens of a prompt", gt=0)
    n_new: int = option(128, "generated tokens", gt=0)
    threads: int = option(2, "CPU threads", gt=0)
    clock: Literal["wall", "cpu"] = option(
        "wall", "clock; cpu: seconds of all threads, for one thread on a busy machine"
    )
    recurrent_model: str = option("", "trained recurrent model; empty: random weights, which exit earlier")
    device: Literal["cpu", "cuda"] = option("cpu", "cuda: only the training of a larger model, bf16, compiled")
    peak_tflops: float = option(989.0, "cuda: dense bf16 peak of the GPU, for its use in percent", gt=0)
    memory_of: Literal["", "ours", "llama", "litgpt", "x-transformers"] = option("", "only the memory of one side")


def interleave(sides: dict[str, Callable[[], None]], args: BenchmarkArguments) -> dict[str, list[float]]:
    """Seconds of every repeat. The sides take turns, so that changes of the machine's load affect all of them."""
    # CPU time is not affected by other processes, but is comparable for one thread only.
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    for run in sides.values():
        run()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], n_tokens: int) -> None:
    """Print best and median tokens per second of every side, and the ratios of the first side to the others."""
    rates = {name: (n_tokens / min(times), n_tokens / statistics.median(times)) for name, times in seconds.items()}
    first = next(iter(rates))
    for name, (best, median) in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[first], (best, median))]
        versus = "" if name == first else f"   {first} / {name} = {ratios[0]:.2f} best, {ratios[1]:.2f} median"
        print(f"{title:34} {name:16} best {best:9,.1f}  median {median:9,.1f} tokens/s{versus}", flush=True)


def training_step(side, tokens: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward and backward on tokens (B, L)."""

    def run() -> None:
        side.model.zero_grad()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = side.loss(tokens)
        loss.backward()
        if tokens.is_cuda:  # kernels run asynchronously
            torch.cuda.synchronize()

    return run


def training(args: BenchmarkArguments, is_compiled: bool) -> None:
    """Compare training steps in fp32 and under bf16 autocast."""
    # The layers of x-transformers cannot be compiled separately.
    names = [name for name in args.sides if not (is_compiled and name == "x-transformers")]
    tokens = torch.randint(Shape.vocab_size, (args.batch_size, args.sequence_length))
    for bf16 in (False, True):
        # New models, since compiled ones stay compiled.
        sides = {name: SIDES[name](Shape()) for name in names}
        if is_compiled:
            for side in sides.values():
                compile_blocks(side)
        runs = {name: training_step(side, tokens, bf16) for name, side in sides.items()}
        title = f"{'bf16' if bf16 else 'fp32'} training{', layers compiled' if is_compiled else ''}"
        report(title, interleave(runs, args), tokens.numel())


def compile_blocks(side) -> None:
    """Compile every layer separately, for fixed shapes."""
    for block in side.blocks():
        block.compile(dynamic=False)


def generation(args: BenchmarkArguments) -> None:
    """Compare generation for one prompt, and for 8 prompts of different lengths where padding is supported."""
    # One prompt on all sides.
    sides = {name: SIDES[name](Shape()) for name in args.sides}
    for side in sides.values():
        side.model.eval()
    prompt = torch.randint(1, Shape.vocab_size, (1, args.n_prompt))
    mask = torch.ones_like(prompt)
    runs = {
        name: lambda side=side: assert_length(side.generate(prompt, mask, args.n_new), args)
        for name, side in sides.items()
    }
    report("generation, 1 prompt", interleave(runs, args), args.n_new)

    # 8 prompts, padded on the left to (8, n_prompt).
    prompts = torch.randint(1, Shape.vocab_size, (8, args.n_prompt))
    # The first prompt has full length, the last one about half of it.
    masks = (torch.arange(args.n_prompt) >= torch.arange(8)[:, None] * args.n_prompt // 16).long()
    prompts = prompts * masks
    runs = {
        name: lambda side=sides[name]: assert_length(side.generate(prompts, masks, args.n_new), args)
        for name in (OURS, THEIRS)
        if name in sides
    }
    report("generation, 8 padded prompts", interleave(runs, args), 8 * args.n_new)
    # Padding must not change the tokens.
    if OURS in sides:
        together = sides[OURS].generate(prompts, masks, args.n_new)[:, args.n_prompt :]
        single = [sides[OURS].generate(p[m > 0][None], m[m > 0][None], args.n_new) for p, m in zip(prompts, masks)]
        equal = sum(torch.equal(row, alone[0, -args.n_new :]) for row, alone in zip(together, single))
        print(f"{'generation, 8 padded prompts':34} {OURS:16} {equal} of 8 rows equal to those generated alone")


def assert_length(tokens: Tensor, args: BenchmarkArguments) -> None:
    """Check that a side has generated the requested number of tokens."""
    assert tokens.shape[1] == args.n_prompt + args.n_new, tokens.shape


def memory(args: BenchmarkArguments) -> None:
    """Compare the peak resident memory of two fp32 training steps above that of the model, each in its own process."""
    added = {}  # MB
    for name in args.sides:
        sizes = ["--batch_size", str(args.batch_size), "--sequence_length", str(args.sequence_length)]
        command = [sys.executable, __file__, "--memory_of", name, "--threads", str(args.threads), *sizes]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = (float(word) for word in process.stdout.split()[-2:])
        added[name] = peak - before
        ratio = (
            "" if name == args.sides[0] else f"   {args.sides[0]} / {name} = {added[args.sides[0]] / added[name]:.2f}"
        )
        print(f"{'memory of a training step':34} {name:16} {added[name]:6.0f} MB above the model{ratio}", flush=True)


def memory_of(args: BenchmarkArguments) -> None:
    """Print the memory of this process in MB with the model, and its peak after two training steps."""
    step = training_step(
        SIDES[args.memory_of](Shape()),
        torch.randint(Shape.vocab_size, (args.batch_size, args.sequence_length)),
        bf16=False,
    )
    before = status_in_mb("VmRSS")  # model and imports
    step()
    step()
    print(before, status_in_mb("VmHWM"))


def status_in_mb(name: str) -> float:
    """A field of the status of this process in MB, such as its peak memory."""
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


def recurrent(args: BenchmarkArguments) -> None:
    """Compare generation with a recurrent core with and without early exit."""
    if args.recurrent_model:
        model = MegaTransformerForCausalLM.from_pretrained(args.recurrent_model)
    else:
        # Random weights: no end token, so that all continuations have the same length.
        changes = {"recurrent_exit_criterion": "kl", "recurrent_test_thinking_steps": 16, "eos_token_id": None}
        model = MegaTransformerForCausalLM.from_preset("recurrent-tiny", **changes)
    model.eval()
    max_steps = model.config.recurrent_test_thinking_steps or model.config.recurrent_mean_thinking_steps
    # Time both, and count the thinking steps of the generated tokens.
    prompt = torch.randint(1, model.config.vocab_size, (1, args.n_prompt))
    settings = {"max_new_tokens": args.n_new, "min_new_tokens": args.n_new, "do_sample": False, "pad_token_id": 0}
    thresholds = {"exits on": model.config.recurrent_exit_criteria_threshold, "exits off": 0.0}
    runs, steps = {}, {}
    for name, threshold in thresholds.items():
        runs[name] = lambda threshold=threshold: model.generate(prompt, exit_threshold=threshold, **settings)
        text = runs[name]()
        with torch.no_grad():
            steps[name] = model(text, exit_threshold=threshold, use_cache=False).thinking_steps.float().mean().item()
    weights = "trained" if args.recurrent_model else "random"
    report(f"recurrent generation, {weights}", interleave(runs, args), args.n_new)
    print(f"{'thinking steps per token':34} {'exits on':16} {steps['exits on']:.2f} of {max_steps}", flush=True)


def matrix_parameters(model: nn.Module) -> int:
    """Number of weights that are multiplied with every token: all matrices except untied embeddings."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables - heads)


def training_operations(model: nn.Module, n_sequences: int, length: int) -> float:
    """Operations of forward and backward of the larger shape: 6 per weight and token, and attention.

    A causal query attends to half of the keys on average: 2 products of 2 operations each, three times with the
    backward pass.
    """
    attention = 6 * LARGE.n_layers * LARGE.hidden_size * length
    return (6 * matrix_parameters(model) + attention) * n_sequences * length


def on_gpu(args: BenchmarkArguments) -> None:
    """Compare training of the larger shape in bf16 with compiled layers, and its share of the GPU's peak."""
    tokens = torch.randint(LARGE.vocab_size, (args.batch_size, args.sequence_length), device="cuda")
    sides = {name: SIDES[name](LARGE) for name in (OURS, THEIRS)}
    for side in sides.values():
        side.model.cuda()
        compile_blocks(side)
    runs = {name: training_step(side, tokens, bf16=True) for name, side in sides.items()}
    seconds = interleave(runs, args)
    report("bf16 training, layers compiled", seconds, tokens.numel())
    for name, side in sides.items():
        operations = training_operations(side.model, *tokens.shape)
        share = operations / min(seconds[name]) / args.peak_tflops / 1e12
        n_parameters = sum(p.numel() for p in side.model.parameters())
        print(
            f"{'use of the GPU':34} {name:16} {share:.1%} of {args.peak_tflops:g} TFLOPS, {n_parameters:,} parameters"
        )


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64
    with explained_errors(logging.getLogger("benchmark")):
        if arguments.memory_of:
            memory_of(arguments)
            raise SystemExit
        machine = f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}"
        print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock, {machine}")
        if arguments.device == "cuda":
            on_gpu(arguments)
            raise SystemExit
        for side_name in arguments.sides:
            count = sum(p.numel() for p in SIDES[side_name](Shape()).model.parameters())
            print(f"{side_name}: {count:,} parameters")
        parts = {
            "training": lambda: training(arguments, is_compiled=False),
            "compiled": lambda: training(arguments, is_compiled=True),
            "generation": lambda: generation(arguments),
            "memory": lambda: memory(arguments),
            "recurrent": lambda: recurrent(arguments),
        }
        for part in arguments.measure:
            parts[part]()
