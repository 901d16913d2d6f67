"""A folder of runs with small checkpoints, and the page over it."""

import pytest

from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from utils.app.arguments import AppArguments
from utils.app.server import serve


@pytest.fixture(scope="session")
def runs(latent_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "runs"
    save_diffusion_checkpoint(folder / "image_diffusion" / "small", latent_cache)
    return folder


@pytest.fixture(scope="session")
def page(runs):
    """The running page."""
    page = serve(AppArguments(runs=str(runs), port=0, max_upload_mb=1))
    yield page
    page.close()


@pytest.fixture
def client(page):
    """A visitor of the page, with a session of its own."""
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)
