"""What a process that loads data gets where it is started anew, as on macOS and Windows, instead of forked."""

import pickle

import pytest
from transformers import TrainerCallback

from tests.helpers.runs import run_stage
from tests.stages.test_waits_for_the_device import STAGES


class PickledLoader(TrainerCallback):
    """Sends the parts of the training's loader as `multiprocessing` does."""

    size = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        loader = train_dataloader
        parts = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
        self.size = len(pickle.dumps(parts))


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_its_parts_can_be_sent(name, request, tmp_path, fresh_logging):
    stage, common, source, _ = STAGES[name]
    cache = request.getfixturevalue(source) if isinstance(source, str) else source(tmp_path / "cache")
    if name == "streams":  # The flags of its caches.
        common, cache = [*common, *cache], None
    callback = PickledLoader()

    class Watched(stage):
        def build_callbacks(self, trainer, writer):
            return [callback]

    run_stage(Watched, common, cache, tmp_path, "run", 1)
    assert callback.size > 0
