"""What was tuned for a machine: sizes and thresholds, each with what was measured.

None of these changes what is computed, only in how many pieces, and by which of several ways. They
were measured on x86 CPUs with 2 to 16 cores, in float32; accelerators have their own value where
one is named.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        least_moment_work: Multiply-adds that products of patches take an image, from which more is
            won by another way to their second moment than is lost by compiling it.
        most_slices: Entries of a patch along one axis up to which images are sliced, not indexed.
        most_row_products: Products of rows of images that are worth compiling.
        worthwhile_rows: Products of rows, against those of the patches' rows, up to which they are
            cheaper.
        most_places: Entries of a patch for whose pairs a plan of correlations is made.
        most_correlations: Convolutions that are worth compiling for it.
        fewest_channels: Convolutions of fewer channels are slow.
        fewest_images: The same where images are the channels.
        cached_bytes: Memory for the images that a core has at hand.
        record_bytes: Most memory for what layers hand on of a batch; larger batches are worked on
            in chunks.
        reused_bytes: Memory that a CPU can well use again and again: new pages take as long as what
            is computed in them, and a loop over chunks of this size uses the same ones.
        layouts: Copies of what sums are formed from: the model's, a weighted one, one for products.
        evaluations: Most pairs of an input and a weight sample that the network is evaluated at
            together.
        samples_together: Samples of small models are drawn together up to this many numbers; more
            is no faster.
        table_bytes: Most memory for the predictions of a dataset, and for the Jacobians that are
            kept for a grid of priors.
        passes_kept: Most compiled functions of one model that are kept, for other calls with it.
        shapes_kept: Most shapes of batches that passes are known for.
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
    least_moment_work: int = 2**17
    most_slices: int = 32
    most_row_products: int = 64
    worthwhile_rows: float = 0.85
    most_places: int = 32
    most_correlations: int = 32
    fewest_channels: int = 16
    fewest_images: int = 8
    cached_bytes: int = 2**20
    record_bytes: int = 2**30
    reused_bytes: int = 2**25
    layouts: int = 3
    evaluations: int = 2048
    samples_together: int = 2**20
    table_bytes: int = 2**28
    passes_kept: int = 16
    shapes_kept: int = 64


MACHINE = Machine()
"""What is read, at every call: tests put another one in its place."""


def on_cpu() -> bool:
    """Whether arrays are worked on by a CPU unless they say otherwise."""
    return jax.default_backend() == "cpu"


CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says what the processes of a container may have together."""


def room() -> int | None:
    """Bytes that the arrays of a device, or of this process, may have; None if nobody says."""
    told = jax.local_devices()[0].memory_stats()
    if told and "bytes_limit" in told:
        return int(told["bytes_limit"])
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # systems that have no such name
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
        limits.append(int(CGROUP.read_text()))
    with contextlib.suppress(ImportError):  # a module of Unix
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    return min((limit for limit in limits if limit > 0), default=None)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let OpenBLAS work with one thread, where threadpoolctl is installed to tell it so.

    JAX's LAPACK is SciPy's, whose threads wait for each other by spinning: a decomposition takes
    several times as long on two threads as on one as soon as anything else runs on the machine.
    """
    pools = thread_pools()
    with contextlib.nullcontext() if pools is None else pools.limit(limits=1, user_api="blas"):
        yield


@functools.cache
def thread_pools() -> Any:
    """The libraries of the process that have threads; SciPy's is loaded with JAX."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
