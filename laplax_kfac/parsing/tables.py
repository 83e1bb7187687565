"""Tables that are added to data, each row at places of its own: one exact block a row.

A class token, or a table of positions, ``concat([token, x]) + table``, is a bias with another
parameter at every place. Its gradient is the cotangent there, or the sum of those of several
places, so that the block of a row is dense and exact: the layer has the features of a row as its
rows and one column, is stacked over the rows, and has the gradients as its inputs (see `norms`).

A table of T rows of D features takes T D^2 numbers. Where these are more than `LARGEST`, rows are
cut into parts of equal size. Small tables have one dense block.
"""

import numpy as np

from laplax_kfac.parsing.layer import TABLE, Layer
from laplax_kfac.parsing.segments import make_segment
from laplax_kfac.parsing.uses import Ids

LARGEST = 2**24
"""Most numbers in the blocks of one table, 64 MB in float32."""


def layer_of(path: str, ids: Ids, row: tuple[int, ...]) -> Layer | None:
    """The layer of those ids of a leaf that are in a table, if they are whole rows of some size.

    Args:
        path: Path of the leaf.
        ids: The ids, in order.
        row: The last axis of the leaf, the size of a row; none for a number.
    """
    (size,) = row or (1,)
    whole = ids.size % size == 0 and (np.diff(ids.reshape(-1, size)) == 1).all()
    fits = (n for n in range(size, 1, -1) if size % n == 0 and ids.size * n <= LARGEST)
    features = next(fits, 1)
    if not whole or features == 1:
        return None
    segment = make_segment(ids.reshape(-1, features, 1))
    part = "row" if features == size else f"{features} of the {size} features of a row"
    return Layer(
        name="",
        pattern=TABLE,
        params=(path,),
        block="kronecker",
        in_features=features,
        out_features=1,
        stack=segment.shape[0],
        reason=f"added at places of its own: one exact block for every {part}",
        segments=(segment,),
    )
