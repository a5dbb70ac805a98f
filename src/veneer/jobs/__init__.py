"""Training as a service: a job queue in the library's database, and workers."""
