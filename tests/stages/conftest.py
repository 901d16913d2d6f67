"""Runs of the multimodal stage on small caches of latents."""

import pytest

from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import Run, changed
from tests.helpers.stream_caches import make_stream_caches


@pytest.fixture(scope="session")
def stream_caches(tmp_path_factory) -> list[str]:
    return make_stream_caches(tmp_path_factory.mktemp("streams"))


@pytest.fixture
def train(stream_caches, tmp_path, fresh_logging):
    """train(common, "name", steps, *flags) -> Run."""

    def call(common: list[str], name: str, steps: int, *flags: str) -> Run:
        words = [*common, *stream_caches, "--output_dir", str(tmp_path), "--run_name", name, "--max_steps", str(steps)]
        try:
            MultimodalStage.main(changed(words, *flags))
        except SystemExit as end:
            raise end.__cause__ or end from None
        return Run(tmp_path / "multimodal" / name, steps)

    return call
