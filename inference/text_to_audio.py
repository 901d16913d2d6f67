"""Make the sounds that captions describe: a WAV file for each prompt and seed, and the settings as JSON.

    python inference/text_to_audio.py --checkpoint runs/audio_diffusion/sounds --prompts "a dog barks" "rain on a roof"
    python inference/text_to_audio.py --checkpoint runs/audio_diffusion/sounds --input prompts.txt --seconds 4 --seed 7

The same seed gives the same sound, independent of the other prompts and seeds.
"""

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.audio.signal import save_waveform
from utils.checkpoints import WeightsKind, chosen_weights, resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.generation.audio_diffusion import AudioSamplingArguments
from utils.generation.captions import CaptionPipeline
from utils.generation.files import claim_folder, write_settings
from utils.generation.speech import read_texts
from utils.generation.text import file_stem
from utils.options import option


@dataclasses.dataclass
class TextToAudioArguments(AudioSamplingArguments):
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run or the cache")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as recorded")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    prompts: list[str] = option([], "captions of the sounds")
    input: str = option("", "file of further captions, one a line; -: standard input")
    seconds: float = option(0.0, "length of the sounds; 0: the median of the training clips", ge=0)
    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    seed: int = option(0, "seed of the noise", ge=0, lt=2**63)
    n_sounds: int = option(1, "sounds per prompt, with seeds seed, seed + 1, ...", gt=0)
    batch_size: int = option(4, "sounds that are made at once", gt=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")
    output_dir: str = option("inference/generated/sounds", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.prompts or self.input):
            raise ValueError("--checkpoint and --prompts or --input are needed: a run folder, and captions")


def generate(args: TextToAudioArguments) -> None:
    """Make a sound for every prompt and seed."""
    prompts, files = [*args.prompts, *read_texts(args.input)], []
    checkpoint, device = resolve_checkpoint(args.checkpoint), compute_device()
    weights = chosen_weights(checkpoint, args)
    names = ("vae_checkpoint", "vocoder_checkpoint", "text_encoder", "bf16")
    options = {name: getattr(args, name) for name in names}
    pipeline = CaptionPipeline.load(checkpoint, **options, weights=weights, device=device)
    rate, args.temperature = pipeline.vae.config.sample_rate, pipeline.temperature_of(args)
    folder = claim_folder(args.output_dir, args)
    # Every prompt with every seed, in batches; a file is written as soon as its batch is ready.
    tasks = [(n, prompt, args.seed + i) for n, prompt in enumerate(prompts) for i in range(args.n_sounds)]
    captions, seeds = [prompt for _, prompt, _ in tasks], [seed for *_, seed in tasks]
    sounds = pipeline.sounds(captions, seeds, args, seconds=args.seconds, batch_size=args.batch_size)
    for (number, _, _), (prompt, seed, waveform) in zip(tasks, sounds, strict=True):
        file, seconds = f"{file_stem(number, prompt, seed)}.wav", len(waveform) / rate
        gain = save_waveform(waveform, rate, folder / file)
        files.append({"file": file, "prompt": prompt, "seed": seed, "seconds": seconds, "gain": gain})
        print(f"{folder}/{file}  {seconds:.2f} s  {prompt}", flush=True)
    write_settings(folder, args, **pipeline.record, files=files)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("text_to_audio")):
        generate(parse_arguments(TextToAudioArguments, None, __doc__ or ""))
