"""Several repairs, one after another."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from secateur.core.context import Context
from secateur.core.slots import Repair
from secateur.core.units import Kept


class Several(Repair):
    """Repairs that follow each other, for example least squares and then the statistics of batch normalization.

    Attributes:
        repairs: In their order.
    """

    name = "several"
    repairs: tuple[Annotated[SerializeAsAny[Repair], BeforeValidator(Repair.parse)], ...]

    def before_cut(self, context: Context, kept: Kept) -> None:
        """Let each repair do what it does before the cut; mutates the model."""
        for repair in self.repairs:
            repair.before_cut(context, kept)

    def after_cut(self, context: Context) -> None:
        """Let each repair do what it does after the cut; mutates the model."""
        for repair in self.repairs:
            repair.after_cut(context)
