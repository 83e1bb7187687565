"""Random networks as plain descriptions: what hypothesis draws, shrinks and prints.

Every description is valid: a part brings its input to the rank that it needs, and a way of calling
a part that does not fit its shapes is left for the plain one. Parts of a network can therefore be
left out one by one, which is how a failing case shrinks. The first value of every choice is the
simplest.
"""

from dataclasses import dataclass, replace

from hypothesis import strategies as st

KINDS = (
    "dense", "dense_left", "dense_einsum", "dense_scaled", "dense_masked", "dense_fused",
    "dense_part", "dense_flat", "dense_summed", "stopped", "low_rank", "weight_norm", "tied",
    "glu", "mixer", "heads", "gain", "shift", "shift_part", "layer_norm", "rms_norm", "positions",
    "class_token", "lookup", "conv1d", "conv2d", "conv_transpose", "depthwise", "attention",
    "attention_fused", "rnn",
)  # fmt: skip
CALLS = (
    "plain", "jit", "remat", "residual", "twice", "vmap", "map", "cond", "switch", "branches",
    "siamese", "scan", "fori", "ensemble", "float32", "bfloat16",
)  # fmt: skip
ACTIVATIONS = ("", "tanh", "relu", "gelu", "sin")
LOSSES = (
    "mse", "cross_entropy", "binary_cross_entropy", "poisson", "gaussian", "callable",
    "weighted_mse", "weighted_cross_entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A layer, and how the network calls it; ``variant`` chooses among strides, paddings, ..."""

    kind: str = "dense"
    call: str = "plain"
    width: int = 2
    bias: bool = True
    activation: str = ""
    variant: int = 0


@dataclass(frozen=True)
class Case:
    """A network, data, a loss and options.

    Attributes:
        shape: Of an input; a vector, a sequence, or an image, channels last.
        vocabulary: Number of tokens where inputs are a sequence of such; 0 for real inputs.
        parts: The layers.
        pool: How positions are put together in the end: "mean", "ravel", "first", or "none".
        head: The last layer: "dense", "dense_bias", "embedding" (tied to it) or "none".
        outputs: Its width.
        examples: How many.
        dtype: Of parameters and inputs.
        seed: Of their values.
        loss: Name of the loss.
        fisher_type: And all others, options of `kfac`.
        chosen: Which parameters are covered: "all", "last_layer", or "some".
        weights: Whether examples have weights.
    """

    shape: tuple[int, ...] = (2,)
    vocabulary: int = 0
    parts: tuple[Part, ...] = ()
    pool: str = "mean"
    head: str = "dense"
    outputs: int = 2
    examples: int = 1
    dtype: str = "float64"
    seed: int = 0
    loss: str = "mse"
    fisher_type: str = "type2"
    kfac_approx: str = "expand"
    curvature: str = "kronecker"
    eigenvalue_correction: bool = True
    fallback: str = "dense"
    dense_limit: int = 256
    separate_weight_and_bias: bool = False
    chosen: str = "all"
    vmap_over_data: bool = True
    weights: bool = False

    @property
    def precision(self) -> str:
        """The coarsest dtype in the network."""
        calls = {part.call for part in self.parts}
        coarse = [dtype for dtype in ("bfloat16", "float32") if dtype in {*calls, self.dtype}]
        return coarse[0] if coarse else "float64"


PARTS = st.builds(
    Part,
    kind=st.sampled_from(KINDS),
    call=st.sampled_from((*["plain"] * 8, *CALLS[1:])),
    width=st.integers(2, 3),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    variant=st.integers(0, 5),
)
MOST_PARTS = 3
SHAPES = st.sampled_from([(2,), (3,), (2, 3), (3, 2), (4, 2), (3, 3, 1), (3, 2, 2)])


def _valid(case: Case) -> Case:
    """Bring combinations that `kfac` refuses to ones that it takes."""
    if case.vocabulary:  # tokens are a sequence
        case = replace(case, shape=(case.shape[0] + 1,))
    if (case.loss, case.fisher_type) == ("callable", "mc"):  # nothing to draw targets from
        case = replace(case, loss="mse")
    if case.fisher_type == "forward_only":
        return replace(case, curvature="kronecker", eigenvalue_correction=False)
    if case.curvature != "kronecker":
        return replace(case, eigenvalue_correction=False)
    return case


def cases() -> st.SearchStrategy[Case]:
    """Any case. All choices are made whatever the others are: so each shrinks on its own."""
    fisher_types = ["type2", "type2", "type2", "empirical", "empirical", "mc", "forward_only"]
    return st.builds(
        Case,
        shape=SHAPES,
        vocabulary=st.sampled_from([0, 0, 0, 4]),
        parts=st.tuples(*[st.tuples(st.booleans(), PARTS)] * MOST_PARTS).map(
            lambda drawn: tuple(part for there, part in drawn if there)
        ),
        pool=st.sampled_from(["mean", "ravel", "first", "none"]),
        head=st.sampled_from(["dense", "dense_bias", "embedding", "none"]),
        outputs=st.integers(1, 3),
        examples=st.integers(1, 3),
        dtype=st.sampled_from([*["float64"] * 5, "float32"]),
        seed=st.integers(0, 9),
        loss=st.sampled_from(["mse", "mse", *LOSSES]),
        fisher_type=st.sampled_from(fisher_types),
        kfac_approx=st.sampled_from(["expand", "expand", "reduce"]),
        curvature=st.sampled_from([*["kronecker"] * 4, "diagonal", "block"]),
        eigenvalue_correction=st.sampled_from([True, True, False]),
        fallback=st.sampled_from(["dense", "dense", "dense", "diagonal", "none"]),
        dense_limit=st.sampled_from([256, 256, 256, 4, 0]),
        separate_weight_and_bias=st.sampled_from([False, False, True]),
        chosen=st.sampled_from(["all", "all", "all", "all", "last_layer", "some"]),
        vmap_over_data=st.sampled_from([True, True, True, False]),
        weights=st.sampled_from([False, False, False, True]),
    ).map(_valid)
