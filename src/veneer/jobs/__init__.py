"""Training as a service: a queue in the library's database, and what carries its jobs out."""
