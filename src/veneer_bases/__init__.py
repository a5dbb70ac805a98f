"""Weights of veneer's image bases. `veneer.models.builtin` finds this package's folders by name."""

__version__ = "0.1.0"
