"""Serving: engines, adapters in memory, HTTP surfaces, tenants.

Imports library, models, core and formats; train and serve never import each other.
"""
