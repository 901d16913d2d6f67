r"""Speak texts: a WAV file for each, written as soon as it is spoken, and the settings as JSON.

    python inference/text_to_speech.py --checkpoint runs/audio_diffusion/demo --vocoder_checkpoint runs/vocoder/demo \
        --text "Please call me back tomorrow at half past nine."
    echo "A first sentence. And a second one." | python inference/text_to_speech.py --checkpoint ... --input - --stream

Long texts are spoken sentence by sentence. The same seed gives the same sound for a sentence, whatever its neighbours.
"""

import itertools
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.audio_diffusion import TextToSpeechArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(TextToSpeechArguments, __doc__)

from rich.console import Console
from rich.progress import track

from dataset_loading.audio.signal import save_waveform
from utils.command_line import explained_errors, parse_arguments
from utils.generation.files import claim_folder, write_settings
from utils.generation.speech import SpeechPipeline, join_sentences, read_texts


def speak(args: TextToSpeechArguments) -> None:
    texts, files = [*args.text, *read_texts(args.input)], []
    pipeline = SpeechPipeline.of_flags(args)
    rate, args.temperature = pipeline.vae.config.sample_rate, pipeline.temperature_of(args)
    # All sentences in order, in batches; each text's file is written once its last sentence is spoken.
    sentences = [pipeline.speakable(text, args.language, args.speaker) for text in texts]
    folder = claim_folder(args.output_dir, args) if any(sentences) else Path(args.output_dir)
    waveforms = pipeline.speak(list(itertools.chain(*sentences)), args, **args.voice())
    console, total = Console(stderr=True), sum(map(len, sentences))
    waveforms = iter(track(waveforms, "sentences", total, console=console, disable=not sys.stderr.isatty()))
    for number, (text, parts) in enumerate(zip(texts, sentences)):
        pieces = []
        for part, (sentence, waveform) in enumerate(itertools.islice(waveforms, len(parts))):
            pieces.append(waveform)
            if args.stream:
                save_waveform(waveform, rate, folder / f"{number:03}_{part:03}.wav")
                print(f"{folder}/{number:03}_{part:03}.wav  {len(waveform) / rate:.2f} s  {sentence}", flush=True)
        if pieces:
            whole = join_sentences(pieces, args.pause, rate)
            file, seconds = f"{number:03}.wav", len(whole) / rate
            gain = save_waveform(whole, rate, folder / file)
            files.append({"file": file, "text": text, "seconds": seconds, "gain": gain})
            print(f"{folder}/{file}  {seconds:.2f} s  {text}", flush=True)
    if not files:
        raise ValueError("nothing to say in any text: give letters or numbers with --text or --input")
    write_settings(folder, args, **pipeline.record, files=files)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("text_to_speech")):
        speak(parse_arguments(TextToSpeechArguments, None, __doc__ or ""))
