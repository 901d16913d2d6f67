"""Marks for tests of packages that cannot be built on every machine."""

import pytest

from utils.metrics.audio import not_measured

needs_pesq = pytest.mark.skipif(bool(not_measured(["pesq"])), reason=not_measured(["pesq"]).get("pesq", ""))
