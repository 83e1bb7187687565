"""Curvature: data in, `kfac.Curvature` out; `kfac`, `ekfac`, `kfoc` and the accumulator."""
