"""Guides, and the generator of everything that is drawn from cards and records."""
