"""Tinker's training API: the client's own training loop on a server's base."""
