"""Generate images for prompts: a PNG for each prompt and seed, a sheet of all images, and the settings as JSON.

    python inference/text_to_image.py --checkpoint runs/image_diffusion/demo --prompts "a large panda on red" "a key"
    python inference/text_to_image.py --checkpoint runs/image_diffusion/demo --prompt_file prompts.txt --seeds 7 8

The same seed gives the same image, independent of the other prompts and seeds. --aspect 3:2 or --width sets the size.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.image import TextToImageArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(TextToImageArguments, __doc__)

from utils.command_line import explained_errors, parse_arguments
from utils.drawing.images import draw_prompts, save_image, shrunk, to_image
from utils.generation.files import claim_folder, write_settings
from utils.generation.text import file_stem, read_prompts
from utils.generation.text_to_image import load_pipeline

MAX_SHOWN = 64  # prompts that are shown on the sheet


def generate(args: TextToImageArguments) -> None:
    """Generate an image for every prompt and seed."""
    prompts = [*args.prompts, *(map(str.strip, read_prompts(args.prompt_file)) if args.prompt_file else [])]
    seeds = list(dict.fromkeys(args.seeds)) or list(range(args.n_images))  # A seed given twice gives one image.
    pipeline = load_pipeline(args)
    pipeline.check_prompts(prompts)
    size = pipeline.chosen_size(args)
    folder = claim_folder(args.output_dir, args)
    # Every prompt with every seed, in batches; images of the first prompts are kept for the sheet.
    tasks = [(index, prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds]
    shown, files = [], []
    for start in range(0, len(tasks), args.batch_size):
        batch = tasks[start : start + args.batch_size]
        images = pipeline.images([prompt for _, prompt, _ in batch], [seed for *_, seed in batch], args, size)
        for (index, prompt, seed), image in zip(batch, map(to_image, images)):  # images: (B, 3, Y, X)
            file = f"{file_stem(index, prompt, seed)}.png"
            save_image(image, folder / file)
            print(folder / file)
            files.append({"file": file, "prompt": prompt, "seed": seed})
            shown += [shrunk(image)] if index < MAX_SHOWN else []
    # The sheet, of the first prompts.
    rows = [shown[start : start + len(seeds)] for start in range(0, len(shown), len(seeds))]
    title = f"the first {MAX_SHOWN} of {len(prompts)} prompts" if len(prompts) > MAX_SHOWN else ""
    save_image(draw_prompts(rows, prompts[:MAX_SHOWN], seeds, title=title), folder / "sheet.png")
    write_settings(folder, args, **pipeline.record, seeds=seeds, images=files)
    print(folder / "sheet.png")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("text_to_image")):
        generate(parse_arguments(TextToImageArguments, None, __doc__ or ""))
