"""Memory that is told before it is used: of a pass over a batch, and of the decompositions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jaxtyping import PyTree

from laplax_kfac import liveness, machine
from laplax_kfac.curvature.options import Settings
from laplax_kfac.fisher import fisher_type_of
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.summaries import readable_bytes

SLACK = 1.25
"""What XLA takes more than the order of steps that needs least, in the middle (`liveness`)."""
FLOAT = 4  # bytes of a number, unless x64 is on
DOUBLE = 8  # of one in an eigendecomposition on a CPU


@dataclass(frozen=True)
class Peak:
    """Bytes that a pass over a batch needs at once.

    Attributes:
        arguments: Of parameters, batch, and sums, which are there before and after.
        temporary: What is needed beside them.
    """

    arguments: int
    temporary: int

    @classmethod
    def of(cls, function: Callable[..., PyTree], *args: PyTree) -> "Peak":
        """Of a function made by ``jax.jit``, at arrays or shapes; it is traced, not compiled."""
        closed = function.trace(*args).jaxpr  # type: ignore[attr-defined]
        consts = sum(getattr(x, "nbytes", 0) for x in closed.consts)
        arguments = consts + sum(map(liveness.num_bytes, closed.jaxpr.invars))
        return cls(arguments, int(SLACK * liveness.peak(closed.jaxpr)))

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.temporary


def finalization_bytes(layers: Iterable[Layer]) -> int:
    """Most memory at once from the sums to the blocks, beside the model and the data.

    The sums are there, then the matrices, then their eigenvectors. Beside them, in double
    precision, the small ones that are decomposed together and their eigenvectors, or a wide one in
    whose place they come, and LAPACK's own work of twice the widest; or in the end the eigenvalues
    of all blocks.
    """
    layers = list(layers)
    sums = FLOAT * sum(max(layer.uses, 1) * layer.factor_elements for layer in layers)
    bases = FLOAT * sum(layer.basis_elements for layer in layers)
    diagonals = FLOAT * sum(layer.size for layer in layers)
    decomposed = [pair for layer in layers for pair in layer.decomposed]
    together = machine.MACHINE.decomposed_together
    small = sum(n * n * k for n, k in decomposed if n <= together)
    wide = max((n * n * k for n, k in decomposed if n > together), default=0)
    widest = max((n for n, _ in decomposed), default=0)
    work = DOUBLE * (max(2 * small, wide) + 2 * widest**2)
    return sums + 2 * bases + max(work, diagonals)


PeakWith = Callable[[Settings, int], Peak]
"""(settings, examples) -> the memory of a pass with these settings over so many of the examples."""


def require_room(settings: Settings, examples: int, peak_with: PeakWith) -> None:
    """Refuse a pass that needs more memory than there is, by the estimate.

    Args:
        settings: What is pulled back.
        examples: Examples of the batch.
        peak_with: The memory of such a pass.

    Raises:
        ValueError: If it needs more. It names what would fit.
    """
    room = machine.room()
    if room is not None and peak_with(settings, examples).total > room:
        raise ValueError(refusal(settings, examples, peak_with))


def refusal(settings: Settings, examples: int, peak_with: PeakWith) -> str:
    """Why there is no room for a pass, and what there is room for."""
    peak, room = peak_with(settings, examples), machine.room() or 0
    columns = settings.columns
    changes = {}
    if columns.likelihood.sample_gradient is not None:
        mc = replace(columns, fisher=fisher_type_of("mc"), mc_samples=1, sketches=None)
        changes["fisher_type='mc'"] = mc
    if columns.fisher.takes_sketches:
        changes["sketches=32"] = replace(columns, sketches=32)
    found = {
        text: peak_with(replace(settings, columns=changed), examples)
        for text, changed in changes.items()
    }
    while examples > 1:
        examples //= 2
        found[f"batch_size={examples}"] = smaller = peak_with(settings, examples)
        if smaller.total <= room:
            break
    least = min(room, peak.total / 2)
    fits = [f"{text} ({readable_bytes(p.total)})" for text, p in found.items() if p.total < least]
    return (
        f"a pass over one batch needs about {readable_bytes(peak.total)} of memory, "
        f"{readable_bytes(peak.arguments)} of it for parameters, batch and sums; there are "
        f"{readable_bytes(room)}. "
    ) + (
        f"This fits: {'; '.join(fits)}."
        if fits
        else "Smaller factors need less: `max_factor_size`, `factor_kinds`; or cover fewer "
        "parameters by `params_filter`. `find_layers` prints what each layer takes."
    )
