"""Triton kernels for GPUs, each behind an op of the folder above: see launch.py for how one is written and checked."""
