"""Serving: requests, scheduler, cache, runner, adapters in memory; the HTTP surfaces; tenants, limits, accounting.

Imports library, models, core and formats; train and serve never import each other.
"""
