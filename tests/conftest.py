"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The first example of a property may compile, on a machine with other work.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
