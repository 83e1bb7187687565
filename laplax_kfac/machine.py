"""What was tuned for a machine: sizes and thresholds, each with what was measured.

None of these changes what is computed, only in how many pieces, and by which of several ways. They
were measured on x86 CPUs with 2 to 16 cores, in float32; accelerators have their own value where
one is named.
"""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Machine:
    """Sizes and thresholds.

    Attributes:
        wide: Width from which a product x^T x by tiles pays: it needs half of the operations, but
            each tile is a call.
        tile: Width of a tile: a multiple of the registers of matrix products, and not of a large
            power of two, at which the rows of an array share their place in a cache.
        most_tiles: Most tiles along a side: those of wider matrices are wider, or there were more
            calls to compile than time to win.
        slow_widths: Widths at which a product takes longer than at the next: with 64 twice as long.
        decomposed_together: Width up to which matrices are decomposed in one program, and together
            if of one width. LAPACK's threads have work for all in a wider one, and wait for each
            other in several at once: up to twice the processor time.
        formed: Numbers that are formed at once from the records of several examples.
        cached: Numbers of gradient matrices that are formed at once: they should stay in a cache.
        columns: Most columns at once, for the code of a sum over them has as many terms.
        stored: Multiply-adds of a large product in the time of writing a number and reading it.
        largest_window: Entries of the largest window of a max pooling that is unrolled; the code
            has as many terms.
        most_phases: Convolutions without strides that one with strides is taken apart to.
        copied_patch: Nanoseconds to copy an entry of a patch, as XLA does for the pullback of a
            convolution.
        row_entry: Nanoseconds for an entry of a product over whole rows of an image, apart from
            its multiply-adds.
        row_products: Multiply-adds of such a product in a nanosecond.
        row_margin: By how much rows must be faster than patches to be taken.
    """

    wide: int = 384
    tile: int = 208
    most_tiles: int = 6
    slow_widths: tuple[int, ...] = (64, 256)
    decomposed_together: int = 512
    formed: int = 2**23
    cached: int = 2**20
    columns: int = 16
    stored: int = 200
    largest_window: int = 64
    most_phases: int = 16
    copied_patch: float = 0.6
    row_entry: float = 0.6
    row_products: float = 70.0
    row_margin: float = 0.7


MACHINE = Machine()
"""What is read, at every call: tests put another one in its place."""


def on_cpu() -> bool:
    """Whether arrays are worked on by a CPU unless they say otherwise."""
    return jax.default_backend() == "cpu"
