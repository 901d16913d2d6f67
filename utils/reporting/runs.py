"""What the folder of a run holds, read for a page: what is missing, half-written or damaged is named, not raised."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from dataset_loading.files import MANIFEST
from model.adapters.lora import is_of_adapter
from utils.checkpoints import STAGE, checkpoints_in, event_files, incompleteness, step_of, weight_files
from utils.evaluation.evaluator import AUDIO
from utils.generation.files import SETTINGS

# Rows of evaluations whose names end the names of wav files, in the order of the page.
KINDS = {
    "ground_truth": "recording",
    "recording": "recording",
    "real": "real, from its latents",
    "griffin_lim": "Griffin-Lim",
    "resynthesis": "vocoder",
    "vocoder": "vocoder",
    "vae": "VAE and vocoder",
    "reconstruction": "VAE and vocoder",
    "teacher": "true durations",
    "model": "this model",
    "generated": "generated",
    "sentence": "generated",
    "prior": "prior alone",
    "shuffled": "shuffled text",
}
MODELS = {"vocoder": "this vocoder", "audio_vae": "this VAE and vocoder"}  # of the row `model`, by stage


@dataclasses.dataclass
class Clip:
    """Audio files of one sound: as recorded, and as models make it.

    Attributes:
        text: what is said, or the name where that is not known.
        files: label -> file.
    """

    text: str
    files: dict[str, Path]


@dataclasses.dataclass
class Run:
    """A run's folder.

    Attributes:
        stage: name of the stage.
        folder: of the run.
        checkpoint: newest complete one.
        record: its stage.json.
        history: log lines of its trainer_state.json.
        metrics: metrics.json.
        problems: what could not be read, in words.
    """

    stage: str
    folder: Path
    checkpoint: Path | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, stage: str, folder: Path) -> "Run":
        """Read a run's folder, however far the run has come."""
        run = cls(stage, folder)
        for checkpoint in reversed(checkpoints_in(folder)):
            if problem := incompleteness(checkpoint):
                run.problems.append(f"{checkpoint.name} was not written completely ({problem})")
                continue
            run.checkpoint = checkpoint
            run.record = run.read_json(checkpoint / STAGE)
            state = run.read_json(checkpoint / "trainer_state.json")
            run.history = [line for line in state.get("log_history") or [] if isinstance(line, dict)]
            break
        if run.checkpoint is None:
            run.problems.append("no complete checkpoint yet")
        if (folder / "metrics.json").exists():
            run.metrics = run.read_json(folder / "metrics.json")
        return run

    def read_json(self, file: Path) -> dict[str, Any]:
        """The content of a JSON file; empty, with a problem noted, where it cannot be read."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.problems.append(f"{file.name} cannot be read ({error})")
            return {}
        if isinstance(content, dict):
            return content
        self.problems.append(f"{file.name} holds no object")
        return {}

    @property
    def step(self) -> int:
        """Optimizer steps of the checkpoint, 0 without one."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def n_steps(self) -> int:
        """Optimizer steps that the run is to make; 0: not known."""
        lengths = self.record.get("run_lengths") or []
        return int(lengths[-1][-1]) if lengths else int(self.record.get("arguments", {}).get("max_steps") or 0)

    @property
    def begun_from(self) -> str:
        """Run, checkpoint or folder whose weights the run began with; "": random ones."""
        return str((self.record.get("arguments") or {}).get("init_from") or "")

    @property
    def is_streams(self) -> bool:
        """Whether this is a model of several modalities, which shares its stage with models of text."""
        return self.stage == "multimodal" and bool(self.record.get("latents"))

    def n_parameters(self) -> int | None:
        """Parameters of the model: as its evaluation counted them, else values in its file of weights."""
        model = self.metrics.get("model")
        if isinstance(model, dict) and isinstance(model.get("parameters"), int):
            return model["parameters"]
        if self.checkpoint is None:
            return None
        total = 0
        try:
            for file in weight_files(self.checkpoint):
                with safe_open(file, "pt") as weights:
                    # Adapters are merged into the weights that they adapt.
                    for name in (name for name in weights.keys() if not is_of_adapter(name)):  # noqa: SIM118
                        size = 1
                        for length in weights.get_slice(name).get_shape():
                            size *= length
                        total += size
        except (OSError, SafetensorError) as error:
            self.problems.append(f"weights cannot be read ({error})")
            return None
        return total

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of the log lines that have a number of this name."""
        lines = [(line.get("step"), line.get(name)) for line in self.history]
        return [(float(x), float(y)) for x, y in lines if isinstance(x, int | float) and isinstance(y, int | float)]

    def logged_images(self) -> dict[str, tuple[int, bytes]]:
        """The newest image of each tag of TensorBoard's files, with its step."""
        images = {}
        for file in event_files(self.folder):
            try:
                events = EventAccumulator(str(file), size_guidance={IMAGES: 1, SCALARS: 1})
                events.Reload()
                for name in events.Tags()[IMAGES]:
                    newest = events.Images(name)[-1]
                    images[name] = (newest.step, newest.encoded_image_string)
            except Exception as error:  # What the library raises on a half-written file depends on its bytes.
                self.problems.append(f"{file.name} cannot be read ({type(error).__name__}: {error})")
        return images

    def sheets(self) -> list[Path]:
        """Contact sheets of its evaluation."""
        return sorted(self.folder.glob("contact_sheet*.png"))

    def clips(self) -> list[Clip]:
        """Audio files of its evaluation, those of the same sound together."""
        captions, labels = self.captions(), KINDS | ({"model": MODELS[self.stage]} if self.stage in MODELS else {})
        kinds, ranks = "|".join(sorted(KINDS, key=len, reverse=True)), list(KINDS)
        sounds: dict[str, list[tuple[int, str, Path]]] = {}
        for file in sorted((self.folder / AUDIO).glob("*.wav")):
            # KEY_ROW.wav, or KEY_ROW_COPY.wav of several copies; another name stands for itself.
            found = re.fullmatch(rf"(.+?)_({kinds})(?:_(\d+))?", file.stem)
            key, kind, copy = found.groups() if found else (file.stem, "", None)
            label = f"{labels.get(kind, 'audio')}{f' {int(copy) + 1}' if int(copy or 0) else ''}"
            sounds.setdefault(key, []).append((ranks.index(kind) if kind else 0, label, file))
        # Where the data set is gone, a key of the form DIRECTION_words-of-the-text still tells the text.
        texts = {key: captions.get(key) or re.sub(r"^\w+-\w+_", "", key).replace("-", " ") for key in sounds}
        return [Clip(texts[key], {label: file for _, label, file in sorted(files)}) for key, files in sounds.items()]

    def captions(self) -> dict[str, str]:
        """Key of a sample, and stem of its raw file, -> its text, from the evaluated data set and from transcripts."""
        texts = {}
        for row in self.metrics.get("transcripts") or []:
            if isinstance(row, dict):
                texts[str(row.get("key"))] = str(row.get("text") or "")
        data = self.metrics.get("data") or self.record.get("data") or {}
        manifest = Path(str(data.get("folder") or ""), MANIFEST)
        if data.get("folder") and manifest.is_file():
            entries = self.read_json(manifest).get("entries")
            for rows in entries.values() if isinstance(entries, dict) else ():
                for row in rows if isinstance(rows, list) else ():
                    if isinstance(row, dict) and row.get("caption"):
                        texts[str(row.get("key"))] = texts[Path(str(row.get("source"))).stem] = str(row["caption"])
        return texts

    def generated(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Folders of inference within the run's, with their settings.json; unfinished ones are left out."""
        for file in sorted(self.folder.glob(f"*/{SETTINGS}")):
            settings = self.read_json(file)
            if settings and settings.get("is_complete", True):
                yield file.parent, settings
