"""Patches over images, cut out one by one."""

import numpy as np

from laplax_kfac.patterns.patches import Axis

CASES = {
    "line": (Axis(9, 3),),
    "line_of_many": (Axis(5, 40, padding=(20, 19)),),
    "same": (Axis(6, 3, padding=(1, 1)), Axis(5, 2)),
    "strided": (Axis(9, 4, stride=2, padding=(1, 0)), Axis(6, 3, stride=2)),
    "dilated": (Axis(7, 3, padding=(2, 1), dilation=2), Axis(6, 2, dilation=3)),
    "spread": (Axis(4, 4, stride=1, padding=(2, 2), spread=2), Axis(3, 2, spread=3)),
    "spread_and_strided": (Axis(5, 4, stride=3, padding=(1, 2), spread=2),),
    "cropped": (Axis(8, 3, padding=(-2, 1)), Axis(6, 2, padding=(1, -1))),
    "cube": (Axis(5, 2), Axis(3, 2, padding=(1, 1)), Axis(3, 2, stride=2, padding=(0, 1))),
    "tiles": (Axis(6, 3, stride=3), Axis(6, 3, stride=3)),
    "one_entry": (Axis(4, 1), Axis(4, 1)),
    "one_patch": (Axis(3, 3), Axis(4, 4)),
}


def images(axes, count=5):
    rng = np.random.default_rng(0)
    weights = rng.random(count)
    weights[1] = 0.0
    return rng.normal(size=(count, *(axis.size for axis in axes), 2)), weights


def cut_out(axes, x):
    """(examples, patches, entries)."""
    for number, axis in enumerate(axes, start=1):
        x = np.moveaxis(x, number, 0)
        wide = np.zeros(((axis.size - 1) * axis.spread + 1, *x.shape[1:]))
        wide[:: axis.spread] = x
        before, after = axis.padding
        zeros = [np.zeros((max(0, n), *x.shape[1:])) for n in (before, after)]
        wide = wide[max(0, -before) : len(wide) - max(0, -after)]
        x = np.moveaxis(np.concatenate([zeros[0], wide, zeros[1]]), 0, number)
    found = []
    counts = [
        (n - (a.patch - 1) * a.dilation - 1) // a.stride + 1
        for n, a in zip(x.shape[1:], axes, strict=False)
    ]
    for position in np.ndindex(*counts):
        entries = [
            p * a.stride + a.dilation * np.arange(a.patch)
            for p, a in zip(position, axes, strict=True)
        ]
        found.append(x[(slice(None), *np.ix_(*entries))].reshape(len(x), -1))
    return np.stack(found, axis=1)
