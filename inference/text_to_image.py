"""Draw images for prompts: a PNG for each prompt and seed, a sheet of all, and the settings as JSON.

    python inference/text_to_image.py --checkpoint runs/image_diffusion/demo --prompts "a large panda on red" "a key"
    python inference/text_to_image.py --checkpoint runs/image_diffusion/demo --prompt_file prompts.txt --seeds 7 8

The same seed gives the same image, whatever else is drawn with it.
"""

import dataclasses
import logging
import re
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.checkpoints import chosen_weights, provenance, resolve_checkpoint, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.drawing.images import Group, draw_sheet, save_image, to_image
from utils.generation.text_to_image import SamplingArguments, TextToImage
from utils.options import option

MAX_ROWS = 32  # prompts on the sheet


@dataclasses.dataclass
class TextToImageArguments(SamplingArguments):
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: the path recorded in training")
    weights: Literal["ema", "raw"] = option("ema", "averaged weights, if they were saved, or the trained weights")
    prompts: list[str] = option([], "captions of the images")
    prompt_file: str = option("", "further captions, one per line")
    n_images: int = option(
        1, "images per prompt, with seeds 0, 1, 2, ...", gt=0, only_with=("seeds", []), aliases=("n_pictures",)
    )
    seeds: list[int] = option([], "seeds of each prompt's images", ge=0)
    batch_size: int = option(16, "images per batch", gt=0)
    output_dir: str = option("inference/generated/image", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.prompts or self.prompt_file):
            raise ValueError("--checkpoint and --prompts or --prompt_file are needed: a run folder, and captions")


def draw(args: TextToImageArguments) -> None:
    """Draw all prompts with all seeds."""
    lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines() if args.prompt_file else []
    prompts = [*args.prompts, *(line.strip() for line in lines if line.strip())]
    if not prompts:
        raise ValueError(f"--prompt_file {args.prompt_file} has no line with text")
    seeds, folder = args.seeds or list(range(args.n_images)), Path(args.output_dir)
    checkpoint = resolve_checkpoint(args.checkpoint)
    weights = chosen_weights(checkpoint, args)
    device = str(compute_device())
    painter = TextToImage.load(checkpoint, args.vae_checkpoint, weights, device)
    tasks, drawn, files = [(*each, seed) for each in enumerate(prompts) for seed in seeds], [], []
    for start in range(0, len(tasks), args.batch_size):
        batch = tasks[start : start + args.batch_size]
        images = painter.images([task[1] for task in batch], [task[2] for task in batch], args)
        for (number, prompt, seed), image in zip(batch, map(to_image, images)):
            file = f"{number:03}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower())[:60]}_seed{seed}.png"
            save_image(image, folder / file)
            print(folder / file)
            files.append({"file": file, "prompt": prompt, "seed": seed})
            drawn += [image] if number < MAX_ROWS else []
    rows = [drawn[start : start + len(seeds)] for start in range(0, len(drawn), len(seeds))]
    labels = [f"seed {seed}" for seed in seeds]
    save_image(draw_sheet([Group(*row) for row in zip(rows, prompts)], labels), folder / "sheet.png")
    used = {"checkpoint": str(checkpoint), "weights": weights, "seeds": seeds, "device": device, "images": files}
    write_json(folder / "settings.json", {**dataclasses.asdict(args), **used, **provenance()})
    print(folder / "sheet.png")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("text_to_image")):
        draw(parse_arguments(TextToImageArguments, None, __doc__ or ""))
