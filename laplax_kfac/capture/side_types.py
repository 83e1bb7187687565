"""Types of what capture hands on, which are known before anything is captured."""

from laplax_kfac.capture.layer_io import Cotangents, Features, Patches, Rows, SideIO
from laplax_kfac.parsing.grouping import Member, Resolved


def side_types(member: Member) -> tuple[type[SideIO], type[SideIO]]:
    """Types of the inputs and of the gradients that capture hands on for a use."""
    return member.claim.as_layer_sides(computed_type(member), Cotangents)


def computed_type(member: Member) -> type[SideIO]:
    """Type of what the forward pass computes for a use: its other side is cotangents."""
    if member.claim.lookup_side is not None:
        return Rows
    return Patches if has_moments(member) else Features


def has_moments(member: Member) -> bool:
    """Whether the second moment of a use's features is formed without them."""
    return member.claim.moments is not None and member.claim.input_scale is None


def needs_features(resolved: Resolved, *, reduce: bool) -> bool:
    """Whether sums of a layer are formed from its features, and not from what these are made of."""
    layer = resolved.layer
    if layer.block != "kronecker" or reduce or not resolved.members:
        return bool(resolved.members)
    return any(
        not (has_moments(member) and layer.kinds[member.claim.computed_side].holds_all)
        for member in resolved.members
    )
