"""Tenants: who may use which adapter, how much, for what price, and what was used.

    names       what names and patterns may look like            keys       API keys, hashed
    store       the tables, and the settings read from them       audit      who changed what, in a chain of hashes
    manage      every change of the settings, with its audit      rollouts   aliases with weighted versions and shadows
    limits      windows and counters in memory                    journal    notes on disk that outlive a SIGKILL
    writer      one thread that commits in groups                 ledger     a row a request, settled once
    tenants     all of it as the server's Tenancy                 admin      the routes under /admin

One database holds it all: a SQLite file, or PostgreSQL for several servers.
"""
