"""Weights that a function of parameters makes, where its derivative acts on the two sides apart.

Where ``W = f(theta)`` is the weight of a layer with inputs a and gradients g at its outputs, the
gradient in theta is the pullback ``J^T sum_t a_t g_t^T`` with ``J = dW / dtheta``. If theta is a
matrix, and ``J^T X = L X R`` with matrices L and R that depend on the values of parameters alone,

    J^T (a g^T) = (L a) (R^T g)^T,

so that theta is itself the weight of a layer, with inputs ``L a`` and gradients ``R^T g``. Its
block ``L A L^T kron R^T B R`` is as good as that of W. So it is for rows or columns that are scaled
by other parameters (R or L diagonal), centred or mixed (projections), for both factors of a
low-rank product ``U V`` (``L = I, R = V^T`` and ``L = U^T, R = I``), for transposes and
permutations. It is not for what scales entry by entry, for a sum of a matrix and its transpose, or
where a norm of theta is in J: there J^T takes outer products to matrices of higher rank.

Whether it is so is found from pullbacks of four outer products at drawn values, which determine the
two sides up to a scalar, and a fifth: J^T takes a g^T to what the others say of it, for generic a
and g, only if it separates.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, Shaped

from laplax_kfac import jaxprs
from laplax_kfac.patterns.contract import merged

Places = Int[np.ndarray, "rows columns"]
"""Where the entries of a matrix of parameters are among the raveled leaves that hold them."""
Entries = Shaped[np.ndarray, "..."]
Vector = Float[np.ndarray, " _"]
Side = Num[Array, "..."]
"""L or R^T: its diagonal, or the matrix, with a column for every entry of a or of g."""

SIZES = (0.0, 3.0, -3.0)
"""Sizes of drawn parameters, as powers of ten: branches by size are taken on both sides."""


@dataclass(frozen=True, eq=False)
class MadeWeight:
    """A weight as a function of parameters.

    Attributes:
        jaxpr: The weight as a matrix (in, out), of constants and leaves that it is made of.
        own: Constants of the jaxpr itself.
        inputs: The numbers of its other inputs among the program's constants and leaves.
        num_consts: How many of these are constants.
    """

    jaxpr: Jaxpr
    own: tuple[ArrayLike, ...]
    inputs: tuple[int, ...]
    num_consts: int

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of the weight."""
        rows, columns = jaxprs.shape(self.jaxpr.outvars[0])
        return rows, columns

    def pullback(
        self, values: Sequence[ArrayLike], varied: tuple[int, ...]
    ) -> Callable[[Num[Array, "in out"]], Shaped[Array, " p"]]:
        """J^T with respect to some of the inputs, which are raveled and put together.

        Args:
            values: All inputs.
            varied: The numbers of these inputs.
        """

        def weight(moved: list[ArrayLike]) -> Array:
            everything = list(values)
            for number, value in zip(varied, moved, strict=True):
                everything[number] = value
            (found,) = eval_jaxpr(self.jaxpr, [], *self.own, *everything)
            return found

        made, pull = jax.vjp(weight, [values[k] for k in varied])

        def pulled(cotangent: Num[Array, "in out"]) -> Shaped[Array, " p"]:
            (found,) = pull(cotangent.astype(made.dtype))
            return jnp.concatenate([jnp.ravel(x) for x in found])

        return pulled

    def draws(self, consts: Sequence[ArrayLike]) -> Iterator[list[ArrayLike]]:
        """Inputs with leaves of several sizes, all together and entry by entry.

        Some are of one sign, for a root may be taken.
        """
        rng = np.random.default_rng(0)
        for size, spread in [*itertools.product(SIZES, [0.0]), (0.0, 3.0)]:
            drawn: list[ArrayLike] = list(consts)
            for atom in self.jaxpr.invars[len(self.own) + self.num_consts :]:
                shape = jaxprs.shape(atom)
                x = rng.standard_normal(shape) * 10 ** (size + spread * rng.uniform(-1, 1, shape))
                x = np.abs(x) if size > 0 else x
                drawn.append(jnp.asarray(x, jaxprs.spec(atom).dtype))
            yield drawn


@dataclass(frozen=True, eq=False)
class SeparableMap:
    """``J^T X = L X R`` for a matrix of parameters that a weight is made of.

    Attributes:
        made: The weight.
        varied: The numbers of its inputs that hold the parameters.
        places: Where the parameters are in these.
        diagonal: Whether L and R are diagonal.
        keeps_outputs: Whether R is the identity, so that a bias has place beside the weight.
    """

    made: MadeWeight
    varied: tuple[int, ...]
    places: Places
    diagonal: tuple[bool, bool] = (False, False)
    keeps_outputs: bool = False

    def sides(self, values: Sequence[ArrayLike]) -> tuple[Side, Side | None]:
        """L and R^T at values of the inputs; None for an R that is the identity.

        With outer products ``J^T (a b^T) = l(a) r(b)^T``, an entry of ``M = J^T (a b^T)`` that is
        large tells a row x and a column y of M, with which
        ``J^T (c d^T) = (J^T (c b^T) y) (x^T J^T (a d^T)) / (x^T M y)``.
        """
        a, b = (jnp.asarray(generic(n)) for n in self.made.shape)
        pull, places = self.made.pullback(values, self.varied), jnp.asarray(self.places)

        def pulled(c: Array, d: Array) -> Num[Array, "rows columns"]:
            return pull(jnp.outer(c, d))[places]

        if self.keeps_outputs:
            y = b / jnp.sum(b**2)
            return self._matrix(lambda c: pulled(c, b) @ y, 0), None
        x, y, size = pivots(pulled(a, b))
        left = self._matrix(lambda c: pulled(c, b) @ y, 0)
        return left, self._matrix(lambda d: x @ pulled(a, d) / size, 1)

    def tested(self, pulled: dict[tuple[int, int], Entries]) -> "SeparableMap | None":
        """This map, with what its sides are, if pullbacks of outer products agree with it.

        Args:
            pulled: (k, m) -> that of the k-th generic vector of inputs and the m-th of outputs.
        """
        at = {pair: np.asarray(x, np.float64)[self.places] for pair, x in pulled.items()}
        row, column = np.unravel_index(np.abs(at[0, 0]).argmax(), self.places.shape)
        x, y = at[0, 0][:, column], at[0, 0][row]
        left, right = [at[k, 0] @ y for k in range(3)], [x @ at[0, k] for k in range(3)]
        eps = float(np.finfo(pulled[0, 0].dtype).eps)
        if not alike(np.outer(left[1], right[1]), at[1, 1] * (x @ left[0]), eps):
            return None
        ratios = []  # L is diagonal where (L a) / a is the same for all a
        for side, images in enumerate((left, right)):
            size = self.made.shape[side]
            a, b = (generic(size, seed) for seed in (1, 2))
            same = size == images[0].size
            ratios.append(same and alike(images[1] * b, images[2] * a, eps))
        g, r = generic(self.made.shape[1], 1), right[1]
        kept = ratios[1] and alike(g * (r @ g), r * (g @ g), eps)
        return replace(self, diagonal=(ratios[0], ratios[1]), keeps_outputs=kept)

    def meet(self, other: "SeparableMap") -> "SeparableMap":
        """This map, with what is true of it and of the other."""
        (left, right), (others_left, others_right) = self.diagonal, other.diagonal
        return replace(
            self,
            diagonal=(left and others_left, right and others_right),
            keeps_outputs=self.keeps_outputs and other.keeps_outputs,
        )

    def _matrix(self, function: Callable[[Array], Array], side: int) -> Side:
        """The matrix of a linear function, or its diagonal, by as few evaluations as it takes."""
        n, m = self.made.shape[side], self.places.shape[side]
        if self.diagonal[side]:
            return function(jnp.ones(n))
        if n <= m:
            return lax.map(function, jnp.eye(n)).T
        _, transposed = jax.vjp(function, jnp.zeros(n))
        dtype = jax.eval_shape(function, jnp.zeros(n)).dtype
        return lax.map(lambda y: transposed(y)[0], jnp.eye(m, dtype=dtype))


def alike(x: Entries, y: Entries, eps: float) -> bool:
    """Whether two arrays are the same, to half of the digits that their numbers have."""
    return bool(np.abs(x - y).max() <= eps**0.5 * max(np.abs(x).max(), np.abs(y).max()))


def generic(size: int, seed: int = 0) -> Vector:
    """A vector that has nothing to do with any other: of known numbers, none of them small."""
    rng = np.random.default_rng([seed, size])
    return (1.0 + rng.random(size)) * rng.choice([-1.0, 1.0], size)


def pivots(
    matrix: Num[Array, "rows columns"],
) -> tuple[Num[Array, " rows"], Num[Array, " columns"], Num[Array, ""]]:
    """The column x and the row y of a matrix M with its largest entry, and x^T M y."""
    row, column = jnp.unravel_index(jnp.argmax(jnp.abs(matrix)), matrix.shape)
    x, y = matrix[:, column], matrix[row]
    size = x @ matrix @ y
    return x, y, jnp.where(size == 0, 1, size)


def separable(
    made: MadeWeight, consts: Sequence[ArrayLike], varied: tuple[int, ...], places: Entries
) -> SeparableMap | None:
    """The map of parameters to a weight, if its derivative separates as they lie in some matrix.

    Args:
        made: The weight.
        consts: The constants among its inputs.
        varied: The numbers of its inputs that hold the parameters.
        places: Where the parameters are in these, in any number of axes. Some of the axes are the
            rows of the matrix, the others its columns.
    """
    found: SeparableMap | None = None
    pairs = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2)]
    vectors = [[generic(n, seed) for n in made.shape] for seed in range(3)]
    outer = np.stack([np.outer(vectors[k][0], vectors[m][1]) for k, m in pairs])

    @jax.jit
    def pullbacks(values: list[ArrayLike]) -> Shaped[Array, "pairs p"]:
        return lax.map(made.pullback(values, varied), jnp.asarray(outer))

    for values in made.draws(consts):
        pulled = dict(zip(pairs, np.asarray(pullbacks(values)), strict=True))
        if not np.isfinite(list(pulled.values())).all() or not np.any(pulled[0, 0]):
            continue
        tried = [found.places] if found else matrices_of(places)
        seen = (SeparableMap(made, varied, p).tested(pulled) for p in tried)
        here = next((m for m in seen if m is not None), None)
        if here is None:
            return None
        found = here if found is None else found.meet(here)
    return found


def matrices_of(places: Entries) -> Iterator[Places]:
    """All ways to see an array as a matrix, with some of its axes as rows; its last first."""
    long = [axis for axis, n in enumerate(places.shape) if n > 1]
    subsets = itertools.chain(*(itertools.combinations(long, n) for n in range(len(long) + 1)))
    for columns in sorted(subsets, key=lambda s: (s != tuple(long[-1:]), len(s))):
        rows = [axis for axis in range(places.ndim) if axis not in columns]
        yield np.asarray(merged(places, tuple(rows), columns))
