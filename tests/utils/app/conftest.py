"""A folder of runs with small checkpoints, and the page over it."""

import contextlib

import pytest

from tests.helpers.app.page import Visitor, served
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint


@pytest.fixture(scope="session")
def runs(latent_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "runs"
    save_diffusion_checkpoint(folder / "image_diffusion" / "small", latent_cache)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    """The running page, which ends with the module: processes may be forked by what comes next."""
    with served(runs) as page:
        yield page


@pytest.fixture(scope="module")
def client(page):
    """A visitor of the page."""
    with contextlib.closing(Visitor(page)) as client:
        yield client
