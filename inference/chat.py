"""Answer prompts of text, images and audio with a multimodal model: text on the screen, PNG and WAV files.

    python inference/chat.py --checkpoint runs/multimodal/world --draw "a large frog on red" --speak "a small house"
    python inference/chat.py --checkpoint runs/multimodal/world --describe frog.png --transcribe frog.flac
    python inference/chat.py --checkpoint runs/multimodal/world --prompts "<image:frog.png>" "<audio:frog.flac>"
    python inference/chat.py --checkpoint runs/multimodal/world --input captions.txt --input_task draw

--prompts leave it to the model what it answers with. The same seed gives the same answer, whatever else is asked.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.multimodal import ChatArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ChatArguments, __doc__)

import torch

from dataset_loading.audio.signal import save_waveform
from model.multimodal.layout import Part
from utils.checkpoints import chosen_weights, resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.drawing.images import save_image, to_image
from utils.flags.choices import SPANS
from utils.generation.chat import TextStream, answer_questions, read_questions
from utils.generation.files import claim_folder, write_settings
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.text import file_stem


@torch.inference_mode()
def chat(args: ChatArguments) -> None:
    """Answer every prompt, and write files as they come. Raises: ValueError: at the end, where some had no answer."""
    checkpoint, device = resolve_checkpoint(args.checkpoint), compute_device()
    weights = chosen_weights(checkpoint, args)
    vaes = {name: getattr(args, f"{name}_vae_checkpoint") for name in SPANS}
    options = {"vae_checkpoints": vaes, "vocoder_checkpoint": args.vocoder_checkpoint, "bf16": args.bf16}
    pipeline = MultimodalPipeline.load(checkpoint, **options, weights=weights, device=device)
    (questions, failures), answers, text = read_questions(pipeline, args), {}, TextStream(pipeline)
    folder = claim_folder(args.output_dir, args)

    def show(number: int, place: int, part: Part) -> None:
        name = questions[number].name
        content = f"{folder / file_stem(number, name, args.seed)}_{place}"
        if part.modality == "image":
            save_image(to_image(pipeline.image_of(part)), Path(content := f"{content}.png"))
        elif part.modality == "audio":
            save_waveform(*pipeline.sound_of(part), Path(content := f"{content}.wav"))
        else:
            content = pipeline.text_of(part)
        answers[number, place] = {"prompt": name, "modality": part.modality, "answer": content}
        print(text.end(content) if text.ids else f"{name}  ->  {content}", flush=True)

    def show_token(number: int, token: int) -> None:
        print(("" if text.ids else f"{questions[number].name}  ->  ") + text.add(token), end="", flush=True)

    answer_questions(pipeline, questions, args, on_part=show, on_token=show_token if args.stream else None)
    write_settings(folder, args, **pipeline.record, answers=[answers[key] for key in sorted(answers)])
    failures.check(len(questions) + len(failures.reasons))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("chat")):
        chat(parse_arguments(ChatArguments, None, __doc__ or ""))
