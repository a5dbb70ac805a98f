"""Serving: requests, scheduler, cache, runner, adapters in memory; HTTP surfaces.

Tenants, limits, billing.

Imports library, models, core and formats; train and serve never import each other.
"""
