"""Studio: a web page to browse, compare, train and release adapters.

The Studio uses one server's library, engine, jobs and routes, and stores no state of its own: everything on a
page comes from its link, the library, the jobs or the tenants' database.
"""
