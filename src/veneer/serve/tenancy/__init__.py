"""Tenants: who can use which adapter, how much, at what price, and what was used.

    store       the database: tables, the settings read from them, names and patterns
    keys        API keys, hashed
    routes      names with weighted targets, and shadows
    manage      every change of the settings, with its audit entry
    limits      windows and counters in memory
    entry       a request as the ledger records it
    journal     how usage reaches the database, from a file on a local disk
    ledger      a line for each part of a request, settled once; daily sums, and usage reports
    feedback    stored answers, users' feedback on them, training rows
    tenants     all of it as the server's Tenancy
    admin       the routes under /admin

One database holds all of it: a SQLite file, or PostgreSQL for several servers.
"""
