"""Evaluation of a multimodal model: every direction that it was trained on, beside the same with shuffled conditions
and beside models of a single task.

N items, M mel bins, F mel frames.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.cached import evenly_spaced
from dataset_loading.embedded.scenes import caption_factors
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import Item
from model.multimodal import MegaTransformerMultimodal
from utils.checkpoints import places, resolve_checkpoint
from utils.evaluation.arguments.multimodal import MultimodalEvaluationArguments
from utils.evaluation.evaluator import Evaluation, Evaluator
from utils.evaluation.multimodal.beside import Beside
from utils.evaluation.multimodal.directions import DirectionMeter, Judges
from utils.evaluation.multimodal.examples import Examples
from utils.evaluation.multimodal.items import MARGIN, HeldOutItems, directions_of, having
from utils.evaluation.multimodal.judges import ImageJudge, Scores, SpeechJudge
from utils.evaluation.multimodal.losses import TeacherForcing
from utils.evaluation.multimodal.outputs import AnswerGenerator
from utils.evaluation.multimodal.report import DEFINITIONS, tables_of
from utils.evaluation.recordings import Recordings
from utils.generation.exported import home_of, vocoder_of
from utils.generation.multimodal import MultimodalPipeline
from utils.metrics.caption_agreement import UnusableCaptionsError
from utils.metrics.latent_readers import LatentReader, labels_of, saved_reader

logger = logging.getLogger(__name__)

CACHES = {"image": ImageLatentDataset, "audio": AudioLatentDataset}


class MultimodalEvaluator(Evaluator):
    """Generates in every direction for held-out items. Random numbers depend on --seed and the item's key alone."""

    arguments_class = MultimodalEvaluationArguments
    model_class = MegaTransformerMultimodal
    definitions: ClassVar[dict[str, str]] = DEFINITIONS

    def load_model(self):
        args = self.args
        if "cached_dataset" in args.given:
            raise ValueError(
                "--cached_dataset has no effect on a multimodal run: give --image_latents, --audio_latents"
            )
        vaes = {name: getattr(args, f"{name}_vae_checkpoint") for name in CACHES}
        vocoder = vocoder_of(self.checkpoint, args.vocoder_checkpoint)
        vocoder = str(resolve_checkpoint(vocoder)) if vocoder else ""
        self.vocoder_name = vocoder or "Griffin-Lim"
        self.pipeline = MultimodalPipeline.load(
            self.checkpoint,
            vae_checkpoints=vaes,
            vocoder_checkpoint=vocoder,
            weights=self.weights,
            device=self.device,
        )
        model = self.pipeline.model
        model.lm_head.chunk_size = model.config.loss_chunk_size = 0  # A loss in chunks gives no accuracy.
        self.directions = directions_of(self.record)
        self.names = [name for name in CACHES if name in self.record["latents"]]
        self.check_flags()
        return model

    def check_flags(self) -> None:
        """Raises: ValueError: flags of a modality or of a core that the model lacks."""
        args, config = self.args, self.pipeline.model.config
        for name in set(CACHES) - set(self.names):
            flags = [f"{name}_latents", f"{name}_vae_checkpoint", *(["waveforms"] if name == "audio" else [])]
            if given := [flag for flag in flags if getattr(args, flag)]:
                raise ValueError(f"--{given[0]} has no effect: {self.checkpoint} has no {name}")
        if args.waveforms and "wer" not in args.metrics:
            raise ValueError(f"--waveforms has no effect with --metrics {' '.join(args.metrics)}; it needs wer")
        flags = [name for name in ("thinking_steps", "carried_steps", "exit_thresholds") if getattr(args, name)]
        if flags and not config.n_recurrent_layers:
            raise ValueError(f"--{flags[0]} has no effect: {self.checkpoint} has no recurrent core")
        # The flag replaces the criterion of the configuration.
        if args.exit_criterion != "own":
            config.recurrent_exit_criterion = args.exit_criterion
        elif args.exit_thresholds and config.recurrent_exit_criterion != "latent_difference":
            raise ValueError(
                f"--exit_thresholds needs --exit_criterion latent_difference: the model has recurrent_exit_criterion="
                f"{config.recurrent_exit_criterion!r}"
            )
        self.generated = [direction for direction in self.directions if direction.target in self.names]
        if args.carried_steps and not self.generated:
            raise ValueError(f"--carried_steps has no effect: {self.checkpoint} generates neither images nor clips")
        if args.carried_steps and not {"probe", "reader", "wer"} & set(args.metrics):
            raise ValueError(
                f"--carried_steps has no effect with --metrics {' '.join(args.metrics)}; it needs probe, reader or wer"
            )
        n_thinking_steps = config.recurrent_test_thinking_steps or config.recurrent_mean_thinking_steps
        if max(args.carried_steps, default=0) > n_thinking_steps:
            raise ValueError(
                f"--carried_steps={args.carried_steps} exceed the {n_thinking_steps} thinking steps of a sampler's "
                f"first step in {self.checkpoint}"
            )
        if max(args.thinking_steps, default=0) > config.recurrent_max_thinking_steps:
            raise ValueError(
                f"--thinking_steps={args.thinking_steps} exceed recurrent_max_thinking_steps="
                f"{config.recurrent_max_thinking_steps} of {self.checkpoint}"
            )

    # ---- Data.

    def folder(self, name: str) -> Path:
        """The folder of a modality's latents.

        Raises: FileNotFoundError: it is not where it was, nor where it would be if it had moved with the run.
        """
        if given := getattr(self.args, f"{name}_latents"):
            return Path(given)
        recorded = Path(self.record["arguments"][f"{name}_latents"] or f"cached_datasets/{name}_diffusion")
        nearby = places(recorded, self.checkpoint, self.record.get("working_directory", ""))
        folder = next((place for place in nearby if place.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{recorded} does not exist, the {name} latents that {self.checkpoint} was trained on; name their "
                f"folder with --{name}_latents"
            )
        return folder

    def source(self):
        return " and ".join(str(self.folder(name)) for name in self.names), self.args.split or "validation"

    def build_dataset(self):
        """The held-out items; also opens the training items, for probe and readers."""
        split = self.args.split or "validation"
        self.training, held_out = (
            {
                name: CACHES[name](self.folder(name), part).expect(
                    vae_fingerprint=self.record["latents"][name]["vae_fingerprint"]
                )
                for name in self.names
            }
            for part in ("train", split)
        )
        self.items = HeldOutItems(held_out, self.pipeline.model.config)
        texts = [self.pipeline.text_part(item.text) for item in self.items.items]
        self.longest = max(len(part.ids) for part in texts)
        self.beside = [Beside(path, self.generator, self.record) for path in self.args.beside]
        return self.items

    def describe_data(self, dataset, n_samples):
        # The record holds the fingerprint of each folder of latents, except those of older runs.
        recorded = {name: settings.get("fingerprint", "") for name, settings in self.record["latents"].items()}
        is_same = all(value == dataset.caches[name].fingerprint for name, value in recorded.items())
        for name, value in recorded.items():
            if value and value != dataset.caches[name].fingerprint and not getattr(self.args, f"{name}_latents"):
                logger.warning(
                    "%s was rebuilt since the run trained on it (fingerprint %s, now %s): its held-out split may "
                    "contain training samples",
                    *(dataset.caches[name].folder, value, dataset.caches[name].fingerprint),
                )
        folder, split = self.source()
        data = {"folder": folder, "split": split, "fingerprint": dataset.fingerprint, "n_samples": n_samples}
        return {**data, "is_the_runs_own": is_same if all(recorded.values()) else None}

    @cached_property
    def generator(self) -> AnswerGenerator:
        """The generator of the evaluated model."""
        return self.generator_at()

    def generator_at(self, n_thinking_steps: int | None = None, n_carried_steps: int | None = None) -> AnswerGenerator:
        """The generator of the evaluated model at numbers of thinking steps, see `Sampling`; None: its own."""
        args = self.args
        given = {name: getattr(args, name) for name in ("sampler", "n_steps", "guidance_scale")}
        sampling = {name: dict.fromkeys(self.names, value) for name, value in given.items() if value is not None}
        return AnswerGenerator(
            self.pipeline,
            batch_size=args.batch_size,
            sampling=sampling,
            max_new_tokens=self.longest + MARGIN,
            seed=args.seed,
            bf16=args.bf16,
            n_thinking_steps=n_thinking_steps,
            n_carried_steps=n_carried_steps,
        )

    # ---- Judges.

    @cached_property
    def judges(self) -> Judges:
        """Who judges what is generated in the directions of the run, by `--metrics`."""
        args, targets = self.args, {direction.target for direction in self.directions if direction.source}
        judges, metrics = Judges(), set(args.metrics)
        if "image" in targets and "probe" in metrics:
            judges.images = ImageJudge(
                self.training["image"],
                self.items.caches["image"],  # type: ignore[arg-type]
                decode=self.generator.images,
                n_training=args.training_samples,
                device=self.device,
                given=self.features,
            )
        elif self.features:
            raise ValueError(f"--features={args.features} has no effect without generated images and --metrics probe")
        if "audio" in targets and "wer" in metrics:
            audio: Any = self.pipeline.audio
            mel = audio.vae.config.mel
            judges.speech = SpeechJudge(audio.vocode, mel.sample_rate, seed=args.seed)
            if args.waveforms:
                judges.recordings = Recordings(args.waveforms, mel, f"the VAE of {self.checkpoint}")
        if metrics & {"reader", "round_trips"}:
            judges.readers = {name: reader for name in self.names if (reader := self.reader(name)) is not None}
        return judges

    def reader(self, name: str) -> LatentReader | None:
        """The reader of a modality's latents, trained or from the output folder; None where texts are unusable."""
        cache = self.training[name]
        captioned = [index for index, entry in enumerate(cache.entries) if entry["caption"].strip()]
        chosen = evenly_spaced(len(captioned), self.args.training_samples or len(captioned))
        indices = [captioned[number] for number in chosen]
        texts = [cache.entries[index]["caption"].strip() for index in indices]
        try:
            labels = labels_of(texts, caption_factors)
        except UnusableCaptionsError as error:
            logger.warning("no reader of %s latents: %s: %s", name, cache.folder, error)
            return None
        settings = cache.manifest["settings"]
        n_channels = settings["latent_shape"][0] if name == "image" else settings["latent_channels"]

        def load() -> tuple[list[torch.Tensor], list[str]]:
            return [cache[index]["mean"] for index in indices], texts

        file = Path(self.args.output_dir or home_of(self.checkpoint)) / "readers" / f"{name}.safetensors"
        identity = {"data": cache.fingerprint, "n_training": len(indices)}
        with torch.inference_mode(False):
            reader = LatentReader(name, labels, n_channels).to(self.device)  # type: ignore[arg-type]
            return saved_reader(file, reader, load, n_steps=self.args.reader_steps, identity=identity)

    # ---- Measurements.

    def measure(self, dataset, indices):
        args = self.args
        chosen = [dataset[index] for index in indices]
        meter = self.meter(chosen)
        scores, seconds = {}, {}
        for direction in self.directions:
            logger.info("%s", direction.name)
            self.generator.stopwatch.calls.clear()
            if rows := meter.measure(direction, self.generator, self.beside):
                scores[direction.name] = rows
                seconds[direction.name] = 1 / self.generator.stopwatch.per_second()
        metrics: dict[str, Any] = {
            "scores": scores,
            "losses": self.losses(chosen) if "losses" in args.metrics else {},
            "n_items": {direction.name: len(meter.of(direction)) for direction in self.directions},
            "n_copies": args.n_copies,
            "round_trips": meter.round_trips(self.generator) if "round_trips" in args.metrics else {},
            "readers": self.describe_readers(chosen),
            "texts": self.generated_texts(meter),
            "transcripts": meter.transcripts,
            "sampling": self.describe_sampling(),
            "model": {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **({"vocoder": self.vocoder_name} if "audio" in self.names else {}),
            },
        }
        # Other depths of the core, and early exits.
        if args.thinking_steps:
            metrics["thinking_steps"] = [self.depth(n, chosen) for n in sorted(set(args.thinking_steps))]
        if args.carried_steps:
            names = [direction.name for direction in self.generated if direction.name in scores]
            own = {name: {**scores[name]["model"], "seconds": seconds[name]} for name in names}
            others = [self.carried(n, chosen) for n in sorted(set(args.carried_steps))]
            metrics["carried_steps"] = [{"at": None, "directions": own}, *others]
        if args.exit_thresholds:
            metrics["exits"] = [
                {"at": threshold, "directions": self.losses(chosen, exit_threshold=threshold)}
                for threshold in sorted(set(args.exit_thresholds))
            ]
        notes = [judge.problem for judge in (self.judges.images, self.judges.speech) if judge and judge.problem]
        metrics["not_measured"] = notes
        evaluation = Evaluation(metrics, self.scalars(metrics), tables_of(metrics, notes=notes))
        for point in metrics.get("thinking_steps", []):
            for direction, row in point["directions"].items():
                for name in ("bits_per_byte", "ratio_t0.9", "exact", "read_all", "read_top1"):
                    if row.get(name) is not None:
                        curve = evaluation.curves.setdefault(f"{direction}_{name}_by_thinking_steps", {})
                        curve[point["at"]] = row[name]
        self.add_examples(evaluation, meter)
        return evaluation

    def meter(self, chosen: Sequence[Item]) -> DirectionMeter:
        """A meter of some items."""
        return DirectionMeter(
            self.items,
            chosen,
            judges=self.judges,
            has_texts=bool({"texts", "round_trips"} & set(self.args.metrics)),
            n_copies=self.args.n_copies,
        )

    def losses(self, chosen: Sequence[Item], **thinking: Any) -> dict[str, Scores]:
        """Losses of each direction, see `TeacherForcing.scores`."""
        args = self.args
        forcing = TeacherForcing(
            self.model, batch_size=args.batch_size, autocast=self.generator.autocast, seed=args.seed
        )
        rows = {}
        for direction in self.directions:
            if not (having_both := having(chosen, *direction)):
                continue
            parts = {
                name: [self.items.part(item, name, self.pipeline) for item in having_both]
                for name in direction
                if name
            }
            n_bytes = sum(len(item.text.encode()) for item in having_both)
            keys = [item.key for item in having_both]
            rows[direction.name] = forcing.scores(direction, parts, keys=keys, n_bytes=n_bytes, **thinking)
        return rows

    def depth(self, n_steps: int, chosen: Sequence[Item]) -> dict[str, Any]:
        """Losses and the model's own rows at a number of thinking steps."""
        losses, meter, generator = self.losses(chosen, n_steps=n_steps), self.meter(chosen), self.generator_at(n_steps)
        rows = {
            direction.name: {
                **losses.get(direction.name, {}),
                **meter.measure(direction, generator, ()).get("model", {}),
            }
            for direction in self.directions
        }
        return {"at": n_steps, "directions": rows}

    def carried(self, n_steps: int, chosen: Sequence[Item]) -> dict[str, Any]:
        """Scores of what is generated, and seconds per item, with a core's state that is carried over the sampler's
        steps."""
        rows = {}
        for direction in self.generated:
            generator = self.generator_at(n_carried_steps=n_steps)
            if row := self.meter(chosen).measure(direction, generator, ()).get("model", {}):
                rows[direction.name] = {**row, "seconds": 1 / generator.stopwatch.per_second()}
        return {"at": n_steps, "directions": rows}

    # ---- The report.

    def describe_readers(self, chosen: Sequence[Item]) -> dict[str, Any]:
        """What each reader reads, and its own scores on real held-out latents."""
        rows = {}
        for name, reader in self.judges.readers.items():
            items = having(chosen, name)  # type: ignore[arg-type]
            if not items:
                continue
            latents = [self.items.latents(item, name) for item in items]
            scores = reader.score(latents, [item.text for item in items])
            known = {"kind": reader.labels.kind, "classes": reader.labels.describe()}
            rows[name] = {**known, "held_out": scores, "n_held_out": len(items)}
        return rows

    def describe_sampling(self) -> dict[str, Any]:
        """How images and audio are sampled: of each modality that is generated."""
        config, rows = self.model.config, {}
        for name in {direction.target for direction in self.directions} & set(self.names):
            defaults = {"sampler": "sampler", "n_steps": "n_sampling_steps", "guidance_scale": "guidance_scale"}
            given = {flag: getattr(self.args, flag) for flag in defaults}
            rows[name] = {
                flag: getattr(config, f"{name}_{field}") if given[flag] is None else given[flag]
                for flag, field in defaults.items()
            }
        return rows

    def generated_texts(self, meter: DirectionMeter) -> dict[str, list[dict[str, str]]]:
        """True and generated text of each item."""
        return {
            direction.name: [
                {"key": item.key, "text": item.text, "generated": text}
                for item, text in zip(meter.of(direction), texts)
            ]
            for direction, texts in meter.texts.items()
        }

    def scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Numbers for TensorBoard: those of the model in each direction, and the shuffled ones beside them."""
        scalars = {
            f"{direction}/{name}{'' if row == 'model' else '_shuffled'}": value
            for rows_of in ("scores", "round_trips")
            for direction, rows in metrics[rows_of].items()
            for row in ("model", "shuffled")
            for name, value in rows.get(row, {}).items()
        }
        scalars |= {f"{name}/{key}": value for name, row in metrics["losses"].items() for key, value in row.items()}
        return {name: value for name, value in scalars.items() if isinstance(value, int | float)}

    def add_examples(self, evaluation: Evaluation, meter: DirectionMeter) -> None:
        """The sheets of generated images and log-mels beside the real ones, and clips as wav files."""
        title = f"{home_of(self.checkpoint).name}, step {self.step}"
        for direction, outputs in meter.spans.items():
            items = meter.of(direction)
            if not (numbers := evenly_spaced(len(items), self.args.contact_sheet)):
                continue
            name = direction.target
            real = self.generator.outputs([self.items.latents(items[n], name) for n in numbers], name).media()
            copies = [outputs.decode([n + copy * len(items) for n in numbers]) for copy in range(self.args.n_copies)]
            examples = Examples(direction.name, [items[n].text for n in numbers], real, copies)
            file = f"contact_sheet_{direction.name}.png"
            if name == "image":
                evaluation.images[file] = examples.image_sheet(title)
                continue
            audio: Any = self.pipeline.audio
            evaluation.images[file] = examples.mel_sheet(title, audio.vae.config.mel)
            evaluation.audio |= examples.clips(audio.vocode, audio.vae.config.sample_rate)
