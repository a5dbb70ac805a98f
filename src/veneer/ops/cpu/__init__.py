"""The CPU's implementations: C sources, their bindings and self-test; how a process uses memory and threads."""
