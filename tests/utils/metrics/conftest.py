"""Speech."""

import pytest

from tests.helpers.spoken import speak_first


@pytest.fixture(scope="module")
def speech():
    """One spoken sentence at 16 kHz, (S,)."""
    return speak_first()
