"""The models that the page has loaded: the last one of each kind."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from utils.checkpoints import COMPLETE

Model = TypeVar("Model")


class Loaded(NamedTuple):
    """A model in memory.

    Attributes:
        key: checkpoint, its version and settings.
        versions: of the other folders that it was loaded from.
    """

    key: Hashable
    versions: dict[Path, Hashable]
    model: Any


class Models:
    """Keeps the last loaded model of each kind. To be called by one job at a time, as `utils.app.jobs` runs them."""

    def __init__(self) -> None:
        self.loaded: dict[str, Loaded] = {}

    def get(self, kind: str, checkpoint: Path, load: Callable[[], Model], *settings: Hashable) -> Model:
        """The model of a checkpoint, loaded anew where the last one of this kind is another, or where the checkpoint
        or another folder that it was loaded from, such as that of its VAE, has changed since.

        Args:
            kind: under which it is kept, such as "image_diffusion".
            load: loads it; where the model has a `record`, that names the other folders.
            settings: with which it is loaded; others are another model.
        Raises: OSError: the checkpoint is gone; and whatever `load` raises.
        """
        (checkpoint / COMPLETE).stat()
        key = (checkpoint.resolve(), version_of(checkpoint), settings)
        kept = self.loaded.get(kind)
        if kept is not None and kept.key == key and all(version_of(path) == v for path, v in kept.versions.items()):
            return kept.model
        self.loaded.pop(kind, None)  # Its memory is free before that of the next is taken.
        del kept
        model = load()
        self.loaded[kind] = Loaded(key, {path: version_of(path) for path in folders_of(model)}, model)
        return model


def folders_of(model: Any) -> list[Path]:
    """The folders that a pipeline was loaded from, by its record: checkpoints, and a text encoder's."""
    record = getattr(model, "record", {})
    paths = [Path(value) for name, value in record.items() if value and name.endswith(("checkpoint", "text_encoder"))]
    return [path for path in paths if path.is_dir()]


def version_of(folder: Path | None) -> Hashable:
    """What changes where a folder of weights is another one or has changed: the digests of its files, or else their
    sizes and times. The same for None and for all that cannot be read."""
    try:
        if folder is None:
            return None
        place = str(folder.resolve())
        if (folder / COMPLETE).is_file():
            return place, (folder / COMPLETE).read_bytes()  # It lists the digests of all files.
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return place, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except OSError:
        return None
