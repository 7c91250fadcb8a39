"""Honest measurement: counted operations, timed engines, and the report that shows both."""
