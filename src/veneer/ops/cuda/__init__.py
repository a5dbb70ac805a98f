"""Implementations of ops on a GPU: thin calls of torch and of libraries."""
