"""Tenants: who may use which adapter, how much, for what price, and what was used.

    names       what names and patterns may look like            keys       API keys, hashed
    tables      the tables; `versions`: how they became so        store      the settings read from them
    manage      every change of the settings, with its audit      rollouts   routes: weighted versions and shadows
    limits      windows and counters in memory                    audit      who changed what, in a chain of hashes
    entries     a request as the ledger knows it                  outbox     what the ledger is owed, on a local disk
    posting     from the one into the other, and the sums         ledger     a line a part of a request, settled once
    writer      one thread that commits in groups                 usage      what was used, by day
    tenants     all of it as the server's Tenancy                 admin      the routes under /admin

One database holds it all: a SQLite file, or PostgreSQL for several servers.
"""
