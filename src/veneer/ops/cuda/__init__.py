"""Implementations of ops on a GPU: thin wrappers of torch and other libraries."""
