"""Studio: a web page to browse, compare, train and release adapters.

The Studio uses one server's library, engine, jobs and routes. It stores no state of its own: a page shows
what its link, the library, the jobs and the tenants' database contain.
"""
