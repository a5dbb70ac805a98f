"""Tests mirror the package. Helpers are imported as `tests.families`, `tests.tiny_base`."""
