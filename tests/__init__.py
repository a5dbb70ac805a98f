"""The tests mirror the package. Import helpers as `tests.families`, `tests.tiny_base`."""
