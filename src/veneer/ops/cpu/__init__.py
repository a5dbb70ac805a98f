"""CPU implementations: C sources, bindings and self-test; process memory and threads."""
