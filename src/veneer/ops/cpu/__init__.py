"""CPU implementations: C sources, bindings, self-test, memory and threads."""
