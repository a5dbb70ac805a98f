"""Tinker's training API: rows and gradients by the client's own loop, over the base that a server serves."""
