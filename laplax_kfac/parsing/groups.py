"""From findings to groups: claims to the same parameters, and what no claim can have."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from laplax_kfac.parsing import biases, products
from laplax_kfac.parsing.claims import Claim, Group, claims_of
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.uses import Fallback, Findings


def claims_and_fallbacks(
    findings: Findings, space: ParameterSpace
) -> tuple[list[Claim], list[Fallback]]:
    """Turn uses into claims; those that cannot be are fallbacks. Weights come before biases."""
    claims = products.claims(findings, space)
    sums = products.sums_of(findings)
    root_of = {term: (c.use, factor) for c in claims for term, factor in sums[c.use].items()}
    fallbacks = [entry for entry in findings.fallbacks if entry.product not in root_of]
    added = (biases.Bias, products.Product)
    weights = [k for k, use in enumerate(findings.uses) if not isinstance(use.role, added)]
    for number in findings.passed_on & findings.ended:
        reason = "used in a weight that is made of parameters, and in another way"
        fallbacks.append(Fallback.of(findings.uses[number].ids, "other", reason))
    for entry in [*weights, *biases.on_outputs(findings, root_of)]:
        if entry in findings.passed_on or getattr(entry, "use", None) in findings.passed_on:
            continue
        found = claims_of(entry, findings.uses[entry]) if isinstance(entry, int) else [entry]
        claims += [f for f in found if isinstance(f, Claim)]
        fallbacks += [f for f in found if isinstance(f, Fallback)]
    return claims, fallbacks


def group(claims: list[Claim], fallbacks: list[Fallback], size: int) -> list[Group]:
    """Claims on equal ids form groups; overlaps that are not equal become fallbacks."""
    groups: list[Group] = []
    owner = np.zeros(size, np.int32)  # number of the group, from 1
    for claim in claims:
        owners = owner[claim.entries]
        mine = groups[owners.max() - 1] if owners.max() else None
        same = bool(owners.min() == owners.max())
        if mine is None:
            groups.append([claim])
            owner[claim.entries] = len(groups)
        elif same and np.array_equal(mine[0].ids, claim.ids):
            mine.append(claim)
        elif same and np.array_equal(mine[0].ids.swapaxes(1, 2), claim.ids):
            mine.append(replace(claim, transposed=True))
        else:
            reason = "used again in other parts or another arrangement"
            fallbacks.append(Fallback.of(claim.ids, "other", reason))
    return _without_fallbacks(groups, fallbacks, size)


def _without_fallbacks(groups: list[Group], fallbacks: list[Fallback], size: int) -> list[Group]:
    """A group with one fallback parameter is one as a whole: repeat until nothing changes."""
    number = causes(fallbacks, size)
    changed = bool(fallbacks)
    while changed:
        kept = []
        for mine in groups:
            entries = mine[0].entries
            hit = number[entries].max()
            if hit:
                cause = fallbacks[hit - 1]
                ids = mine[0].ids.ravel()
                fallbacks.append(replace(cause, ids=ids, product=-1, added=False))
                number[entries] = np.where(number[entries], number[entries], len(fallbacks))
            else:
                kept.append(mine)
        changed = len(kept) < len(groups)
        groups = kept
    return groups


def causes(fallbacks: list[Fallback], size: int) -> Int[np.ndarray, " P"]:
    """For every parameter, which entry first made it a fallback, from 1; 0 if none did."""
    number = np.zeros(size, dtype=np.int32)
    for k, entry in reversed(list(enumerate(fallbacks, start=1))):
        number[entry.ids] = k
    return number
