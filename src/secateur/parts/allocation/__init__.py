"""How units are shared between groups."""
