"""Experiments: several runs, compared fairly, with intervals."""
