"""Slipway: the commands that every Slipway image carries."""

__version__ = "0.1.0"
