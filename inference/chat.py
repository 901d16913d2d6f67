"""Answer prompts of text, images and audio with a multimodal model: text on the screen, PNG and WAV files.

    python inference/chat.py --checkpoint runs/multimodal/world --draw "a large frog on red" --speak "a small house"
    python inference/chat.py --checkpoint runs/multimodal/world --describe frog.png --transcribe frog.flac
    python inference/chat.py --checkpoint runs/multimodal/world --prompts "<image:frog.png>" "<audio:frog.flac>"

--prompts leave it to the model what it answers with. The same seed gives the same answer, whatever else is asked.
"""

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.audio.signal import save_waveform
from utils.checkpoints import WeightsKind, chosen_weights, provenance, resolve_checkpoint, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.drawing.images import save_image, to_image
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.text import file_stem
from utils.options import option


@dataclasses.dataclass
class ChatArguments:
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    image_vae_checkpoint: str = option("", "folder of the image VAE; default: its copy in the run")
    audio_vae_checkpoint: str = option("", "folder of the audio VAE; default: its copy in the run")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    draw: list[str] = option([], "texts that are drawn")
    speak: list[str] = option([], "texts that are spoken")
    describe: list[str] = option([], "image files that are described")
    transcribe: list[str] = option([], "audio files that are transcribed")
    prompts: list[str] = option(
        [], "prompts with placeholders <image:path> and <audio:path>, answered in any modality"
    )
    max_new_tokens: int = option(64, "maximum number of text tokens of an answer", gt=0)
    temperature: float = option(0.0, "temperature of text and of the length of audio; 0: the most probable", ge=0)
    seed: int = option(0, "seed of the random numbers", ge=0)
    output_dir: str = option("inference/generated/chat", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.draw or self.speak or self.describe or self.transcribe or self.prompts):
            raise ValueError("--checkpoint and one of --draw, --speak, --describe, --transcribe, --prompts are needed")


def chat(args: ChatArguments) -> None:
    """Answer every prompt; a file is written as soon as its part is complete."""
    checkpoint, device = resolve_checkpoint(args.checkpoint), compute_device()
    folder, answers = Path(args.output_dir), []
    weights = chosen_weights(checkpoint, args)
    vaes = {name: getattr(args, f"{name}_vae_checkpoint") for name in ("image", "audio")}
    options = {"vae_checkpoints": vaes, "vocoder_checkpoint": args.vocoder_checkpoint}
    pipeline = MultimodalPipeline.load(checkpoint, **options, weights=weights, device=device)
    for number, (name, parts, sampling) in enumerate(pipeline.tasks(args)):
        stem = file_stem(number, name, args.seed)
        for place, part in enumerate(pipeline.answer([parts], [args.seed], sampling)[0]):
            content = pipeline.text_of(part) if part.modality == "text" else str(folder / f"{stem}_{place}")
            if part.modality == "image":
                save_image(to_image(pipeline.image_of(part)), Path(content := f"{content}.png"))
            elif part.modality == "audio":
                save_waveform(*pipeline.sound_of(part), Path(content := f"{content}.wav"))
            answers.append({"prompt": name, "modality": part.modality, "answer": content})
            print(f"{name}  ->  {content}", flush=True)
    record = {"checkpoint": str(checkpoint), "weights": weights, "device": str(device), "answers": answers}
    write_json(folder / "settings.json", {**dataclasses.asdict(args), **record, **provenance()})


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("chat")):
        chat(parse_arguments(ChatArguments, None, __doc__ or ""))
