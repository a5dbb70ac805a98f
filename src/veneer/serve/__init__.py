"""Serving: engines, the adapter cache, the HTTP API, tenants.

Imports library, models, core and formats; train and serve never import each other.
"""
