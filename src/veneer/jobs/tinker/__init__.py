"""Tinker's training API: a client's own training loop on the server's base."""
