"""Tenants: who can use which adapter, how much, at what price, and what they used.

    store       the database: tables, the settings read from them, names and patterns
    keys        API keys, hashed
    routes      names with weighted targets, and shadows
    manage      every change of the settings, with its audit entry
    limits      windows and counters in memory
    entry       a request as the ledger records it
    journal     a file on a local disk that keeps usage until the database has it
    ledger      a line for each part of a request, settled once; daily sums, and usage reports
    feedback    stored answers, users' feedback on them, training rows
    tenants     the server's Tenancy, built from the other modules
    admin       the routes under /admin

Except for the counters and the journal, everything is stored in one database: a SQLite file, or PostgreSQL
for several servers.
"""
