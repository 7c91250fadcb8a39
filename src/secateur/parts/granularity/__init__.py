"""The smallest thing that lives or dies together."""
