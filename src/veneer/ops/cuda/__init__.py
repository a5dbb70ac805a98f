"""What runs an op on a GPU: thin calls of torch and of libraries."""
