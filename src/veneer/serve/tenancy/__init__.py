"""Tenants: who can use which adapter, how much, at what price, and what was used.

    store       the database: tables, the settings read from them, names and patterns
    keys        API keys, hashed
    routes      names that lead to versions by weight, and shadows
    manage      every change of the settings, with its line in the audit log
    limits      windows and counters in memory
    entry       a request as the ledger records it
    outbox      how usage and answers reach the database: directly (SQLite), or from a local disk (PostgreSQL)
    ledger      a line for each part of a request, settled once; sums by day, and what was used
    feedback    answers that are kept, what users say of them, rows to train on
    tenants     all of it as the server's Tenancy
    admin       the routes under /admin

One database holds all of it: a SQLite file, or PostgreSQL for several servers.
"""
