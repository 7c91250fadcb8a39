"""Channels of one kind: the axes are the same as those of the granularity `channel`, limited to a role."""

from __future__ import annotations

from secateur.parts.granularity.channel import Channel
from secateur.structure.roles import Role


class Head(Channel):
    """Attention heads; where queries share keys and values, these groups, and the query heads within them."""

    name = "head"
    roles: tuple[Role, ...] = ("head", "kv group", "query head")


class KVGroup(Channel):
    """Key and value heads, each with the query heads that share it (grouped-query attention)."""

    name = "kv_group"
    roles: tuple[Role, ...] = ("kv group",)


class HeadDim(Channel):
    """Entries of the queries and keys, or of the values, of every head."""

    name = "head_dim"
    roles: tuple[Role, ...] = ("head dim",)


class Hidden(Channel):
    """Hidden units of MLPs, of experts and of recurrent layers."""

    name = "hidden"
    roles: tuple[Role, ...] = ("hidden unit",)


class Residual(Channel):
    """Entries of the residual stream: the embedding width of a transformer, the widths of a ResNet's stages."""

    name = "residual"
    roles: tuple[Role, ...] = ("residual stream",)


class Expert(Channel):
    """Whole experts of a mixture."""

    name = "expert"
    roles: tuple[Role, ...] = ("expert",)
