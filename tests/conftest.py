"""For all tests: Hypothesis looks at no clock, and tries the same examples each time."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):  # the tests of a GPU do without it
    from hypothesis import HealthCheck, settings

    settings.register_profile("longtake", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("longtake")
