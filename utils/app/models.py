"""The models that the page has loaded: the last one of each kind."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from utils.checkpoints import COMPLETE

Model = TypeVar("Model")


class Models:
    """Keeps the last loaded model of each kind. To be called by one job at a time, as `utils.app.jobs` runs them."""

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[Any, Any]] = {}  # kind -> (checkpoint and settings, model)

    def get(self, kind: str, checkpoint: Path, load: Callable[[], Model], *settings: Hashable) -> Model:
        """The model of a checkpoint, loaded anew where the last one of this kind is another, or the checkpoint has
        changed since.

        Args:
            kind: under which it is kept, such as "image_diffusion".
            load: loads it.
            settings: with which it is loaded; others are another model.
        Raises: OSError: the checkpoint is gone; and whatever `load` raises.
        """
        # COMPLETE.json lists the digests of all files.
        key = (checkpoint.resolve(), (checkpoint / COMPLETE).read_bytes(), settings)
        kept = self.loaded.get(kind)
        if kept is not None and kept[0] == key:
            return kept[1]
        self.loaded.pop(kind, None)  # Its memory is free before that of the next is taken.
        del kept
        model = load()
        self.loaded[kind] = (key, model)
        return model
