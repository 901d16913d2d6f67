"""Make the sounds that captions describe: a WAV file for each prompt and seed, and the settings as JSON.

    python inference/text_to_audio.py --checkpoint runs/audio_diffusion/sounds --prompts "a dog barks" "rain on a roof"
    python inference/text_to_audio.py --checkpoint runs/audio_diffusion/sounds --input prompts.txt --seconds 4 --seed 7

The same seed gives the same sound, independent of the other prompts and seeds.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.audio_diffusion import TextToAudioArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(TextToAudioArguments, __doc__)

from dataset_loading.audio.signal import save_waveform
from utils.command_line import explained_errors, parse_arguments
from utils.generation.captions import CaptionPipeline
from utils.generation.files import claim_folder, write_settings
from utils.generation.speech import read_texts
from utils.generation.text import file_stem


def generate(args: TextToAudioArguments) -> None:
    """Make a sound for every prompt and seed."""
    prompts, files = [*args.prompts, *read_texts(args.input)], []
    pipeline = CaptionPipeline.of_flags(args)
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
