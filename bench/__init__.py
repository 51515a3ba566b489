"""The demo and its parts. Not installed."""
