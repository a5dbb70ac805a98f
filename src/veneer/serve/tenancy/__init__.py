"""Tenants: who may use which adapter, how much, for what price, and what was used.

    store       the database: tables, the settings read from them, names and patterns; `versions`: how it became so
    keys        API keys, hashed
    routes      names that lead to versions by weight, and shadows
    manage      every change of the settings, with its line in the audit log
    limits      windows and counters in memory
    outbox      requests as the ledger knows them, kept on a local disk until it has them
    ledger      a line for each part of a request, settled once; sums by day, and what was used
    tenants     all of it as the server's Tenancy
    admin       what is under /admin

One database holds it all: a SQLite file, or PostgreSQL for several servers.
"""
