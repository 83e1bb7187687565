"""Tolerances by precision."""

from typing import Any

import jax
import jax.numpy as jnp


def tolerance(dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    """Return `rtol` and `atol` for `np.testing.assert_allclose`, by the precision of `dtype`."""
    rtol = {16: 2e-2, 32: 2e-4, 64: 1e-9}[jnp.finfo(dtype).bits]
    return {"rtol": rtol, "atol": rtol / 10}
