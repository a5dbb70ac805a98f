"""GPU implementations of ops: thin wrappers around torch and other libraries."""
