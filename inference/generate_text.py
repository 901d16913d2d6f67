"""Generate continuations of prompts: one file per text, and the settings as JSON.

    python inference/generate_text.py --checkpoint runs/multimodal/demo --prompts "The lambda expression" "A class"
    python inference/generate_text.py --checkpoint runs/multimodal/demo --prompt_file prompts.txt --temperature 0.8
    python inference/generate_text.py --checkpoint runs/multimodal/demo --prompts "A list" --temperature 0 --n_beams 4
    python inference/generate_text.py --checkpoint runs/multimodal/demo --prompts "A list" --n_texts 8

The same seed gives a prompt the same continuations, independent of the other prompts.
"""

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.text import GenerateTextArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(GenerateTextArguments, __doc__)

import torch

from utils.checkpoints import chosen_weights, provenance, resolve_checkpoint, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.generation.files import check_unicode, claim_folder
from utils.generation.text import TextGenerator, copy_seed, read_prompts


@torch.inference_mode()
def generate(args: GenerateTextArguments) -> None:
    """Continue all prompts, each `--n_texts` times."""
    # Prompts of the command line, then those of the file.
    prompts = [*args.prompts, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    check_unicode(*prompts)
    # Copy 0 of every prompt has the given seed, the others seeds derived from it.
    tasks = [(prompt, copy_seed(args.seed, copy)) for prompt in prompts for copy in range(args.n_texts)]
    # The model and its tokenizer.
    checkpoint = resolve_checkpoint(args.checkpoint)
    weights = chosen_weights(checkpoint, args)
    device = str(compute_device())
    generator = TextGenerator.load(checkpoint, weights, device)
    folder = claim_folder(args.output_dir, args)
    # Every text has a seed of its own, so batches do not change what is sampled.
    texts = []
    for start in range(0, len(tasks), args.batch_size):
        batch, seeds = zip(*tasks[start : start + args.batch_size])
        continuations = generator.continue_texts(batch, args, seeds)
        for prompt, seed, continuation in zip(batch, seeds, continuations):
            # A file holds the prompt and its continuation.
            file = folder / f"{len(texts):03}.txt"
            file.write_text(prompt + continuation, encoding="utf-8")
            print(f"--- {file}\n{prompt}{continuation}")
            texts.append({"file": file.name, "prompt": prompt, "seed": seed, "continuation": continuation})
    # Settings, so that the texts can be generated again.
    record = {"checkpoint": str(checkpoint), "weights": weights, "device": device, "texts": texts}
    write_json(folder / "settings.json", {**dataclasses.asdict(args), **record, **provenance()})
    print(folder / "settings.json")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("generate_text")):
        generate(parse_arguments(GenerateTextArguments, None, __doc__ or ""))
