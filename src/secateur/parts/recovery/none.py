"""No recovery."""

from __future__ import annotations

from typing import Literal

from secateur.core.slots import Recovery


class NoRecovery(Recovery):
    """The pruned network is returned as it is."""

    name = "none"
    epochs: Literal[0] = 0
