"""What a fit is of, as short texts: equal in every process for one fit, different for others.

Kept beside half a fit, so that nobody goes on with another model's sums: the program and what it
closes over, the parameters, the loss, the options, the data.
"""

import hashlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac import jaxprs
from laplax_kfac.capture.batches import first_example
from laplax_kfac.curvature.options import Settings
from laplax_kfac.curvature.passes import Arrays
from laplax_kfac.parsing.program import Program
from laplax_kfac.parsing.segments import Scattered

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def of_arrays(tree: PyTree) -> str:
    """Equal for trees of equal arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    found = hashlib.sha256(str(treedef).encode())
    for leaf in leaves:
        key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def of_text(*parts: object) -> str:
    """Equal for things that print the same, but for where they are in memory."""
    return hashlib.sha256(_ADDRESS.sub("", "\n".join(map(str, parts))).encode()).hexdigest()


def of_fit(
    program: Program, settings: Settings, arrays: Arrays, choices: Mapping[str, object]
) -> dict[str, str]:
    """What a fit is of, by part.

    Args:
        program: The parsed model.
        settings: What is pulled back.
        arrays: The first batch, the parameters and the constants.
        choices: What else decides about the numbers.
    """
    columns = settings.columns
    kind = columns.fisher.name, columns.mc_samples, columns.sketches, settings.kfac_approx
    loss: list[object] = [None]
    if columns.pull_back:
        target = first_example(arrays.batch, "target")
        jaxpr, consts, _ = jaxprs.trace(
            lambda f, y, key: columns.vectors(key, f, y), program.output, target, settings.key
        )
        loss = [jaxpr, of_arrays(consts)]
    places = [segment.place for layer in program.layers for segment in layer.segments]
    chosen = [place.ids for place in places if isinstance(place, Scattered)]
    return {
        "the model": of_text(program.jaxpr),
        "arrays that the model closes over": of_arrays(list(program.consts)),
        "the parameters": of_arrays(arrays.leaves),
        "the loss": of_text(*loss),
        "the options": of_text(kind, program.layers, of_arrays(chosen), sorted(choices.items())),
        "the random key": of_arrays(settings.key),
        "the first batch": of_arrays((arrays.batch, arrays.weights)),
        "the version of jax, or the device": of_text(jax.__version__, jax.default_backend()),
    }
