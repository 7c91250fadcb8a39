"""Experiments: several runs, compared fairly, with intervals."""

from pathlib import Path

RESULTS = Path("results") / "records"
"""Where `secateur bench run` puts records, below the working directory."""
