"""What must hold for any network, against its Jacobian by `jax.jacrev` and losses by hand.

Everything below the line is also the tail of the scripts that `programs.source` writes.
"""

import jax
import jax.numpy as jnp
import numpy as np

import laplax_kfac

TOLERANCES = {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.15}
"""Largest errors, as fractions of the largest entry, by the coarsest dtype of a network."""


# -- begin ---------------------------------------------------------------------------------------
PRIOR_PREC = 0.7


class Wrong(AssertionError):
    """A claim that does not hold, by its name."""


def demand(holds, claim):
    """Refuse a claim that does not hold."""
    if not holds:
        raise Wrong(claim)


def require(found, expected, claim, tolerance, scale=0.0):
    """Refuse an error above the tolerance, as a fraction of the largest entry, or of a scale."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    demand(found.shape == expected.shape, f"{claim}: shape {found.shape} for {expected.shape}")
    size = max(np.max(np.abs(expected), initial=0.0), scale, 1e-30)
    error = np.max(np.abs(found - expected), initial=0.0) / size
    demand(error <= tolerance, f"{claim}: relative error {error:.2g}")


def derivatives(loss, f, y):
    """Gradient and Hessian in the output of one example's loss, from their definitions."""
    f, weights = np.asarray(f, float), np.ones(1)
    if loss.startswith("weighted"):
        loss, (y, weights) = loss.removeprefix("weighted_"), y
        weights = np.repeat(np.ravel(weights), f.shape[-1])
    y = np.asarray(y)
    if loss == "cross_entropy":
        p = np.exp(f - f.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True)).reshape(-1, f.shape[-1])
        gradient = p - np.eye(f.shape[-1])[y.ravel()]
        hessian = np.zeros((f.size, f.size))
        for k, row in enumerate(p):
            at = slice(k * len(row), (k + 1) * len(row))
            hessian[at, at] = np.diag(row) - np.outer(row, row)
    elif loss == "binary_cross_entropy":
        p = 1 / (1 + np.exp(-f))
        gradient, hessian = p - y, np.diag(np.ravel(p * (1 - p)))
    elif loss == "poisson":  # e^f - y f
        gradient, hessian = np.exp(f) - y, np.diag(np.exp(f).ravel())
    elif loss == "callable":  # log cosh (f - y)
        slope = np.tanh(f - y)
        gradient, hessian = slope, np.diag(np.ravel(1 - slope**2))
    else:  # (f - y)^2 over 2 s, with s = 1/2 for mse
        precision = {"mse": 2.0, "gaussian": 1 / 0.3}[loss]
        gradient, hessian = precision * (f - y), precision * np.eye(f.size)
    weights = np.broadcast_to(weights, f.size)
    return weights * np.ravel(gradient), weights[:, None] * hessian


def jacobians(program):
    """Outputs (N, ...) and Jacobians (N, C, P) of the model."""
    model_fn, params, batched = (
        program["model_fn"],
        program["params"],
        not program["options"].get("vmap_over_data", True),
    )

    def one(p, x):
        return model_fn(input=x[None], params=p)[0] if batched else model_fn(input=x, params=p)

    both = jax.vmap(lambda x: (one(params, x), jax.jacrev(one)(params, x)))
    outputs, jacobian = jax.jit(both)(program["inputs"])
    n = len(outputs)
    leaves = zip(jax.tree.leaves(jacobian), jax.tree.leaves(params), strict=True)
    columns = [np.asarray(j, float).reshape(n, -1, x.size) for j, x in leaves]
    return np.asarray(outputs, float), np.concatenate(columns, axis=2)


def layer_ids(curvature):
    """For every layer, the ids of its parameters, in the shape (stack, rows, out) or (p,)."""
    for layer in curvature.layers:
        rows = [np.asarray(curvature.space.ids(segment)) for segment in layer.segments]
        yield layer, np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0)


def check_accounting(curvature, params):
    """Every parameter is in exactly one layer, and names are unique."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    found = np.sort(np.concatenate([ids.ravel() for _, ids in layer_ids(curvature)]))
    everything = np.arange(sum(sizes))
    demand(np.array_equal(found, everything), "accounting: parameters are not in one layer each")
    names = [layer.name for layer in curvature.layers]
    demand(len({*names}) == len(names), f"accounting: two layers have one name: {names}")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaf_of = np.repeat(np.arange(len(sizes)), sizes)
    for layer, ids in layer_ids(curvature):
        demand(layer.size == ids.size, f"accounting: {layer.name} has size {layer.size}")
        leaves = {paths[k] for k in leaf_of[ids.ravel()]}
        demand({*layer.params} == leaves, f"accounting: {layer.name} names {layer.params}")


@jax.jit
def summary(curvature):
    """The matrix, its diagonal and trace, and the posterior's determinant, in one compilation."""
    diagonal = jnp.concatenate([x.ravel() for x in jax.tree.leaves(curvature.diagonal())])
    logdet = curvature.logdet(prior_prec=PRIOR_PREC)
    return curvature.to_dense(), diagonal, curvature.trace(), logdet


def check_matrix(curvature, dense, diagonal, trace, tolerance):
    """`to_dense` is symmetric, positive semi-definite, and what the methods are of."""
    require(dense, dense.T, "symmetry", 1e-9)
    values = np.linalg.eigvalsh(dense)
    smallest = values.min()
    demand(
        smallest >= -1e-9 * max(values.max(), 1e-30),
        f"positive semi-definite: smallest eigenvalue {smallest:.2g}",
    )
    inside = np.zeros(dense.shape, bool)
    for layer, ids in layer_ids(curvature):
        flat = ids.ravel()
        inside[np.ix_(flat, flat)] = layer.block != "none"
    require(np.where(inside, 0.0, dense), np.zeros_like(dense), "zero outside of blocks", 0.0)
    require(diagonal, np.diag(dense), "diagonal", tolerance)
    require(trace, np.trace(dense), "trace", 1e-6)


def exact_curvature(program, outputs, jacobian):
    """The curvature that blocks are of, and every example's gradient; None if there is no such."""
    options, targets = program["options"], program["targets"]
    weights = program["weights"]
    counts = np.ones(len(outputs)) if weights is None else np.asarray(weights)
    total: np.ndarray | None = np.zeros(2 * [jacobian.shape[2]])
    gradients: list[np.ndarray] = []
    for n, (f, j) in enumerate(zip(outputs, jacobian, strict=True)):
        y = jax.tree.map(lambda y, n=n: np.asarray(y[n]), targets)
        gradient, hessian = derivatives(program["loss"], f, y)
        gradients.append(j.T @ gradient)
        if options.get("fisher_type") == "empirical":
            total += counts[n] * np.outer(gradients[-1], gradients[-1])
        else:
            total += counts[n] * j.T @ hessian @ j
    if options.get("fisher_type") in {"mc", "forward_only"}:
        total = None
    return total, np.stack(gradients)


def check_blocks(program, curvature, dense, exact, tolerance):
    """Dense and diagonal blocks are exact; EKFAC is the projection on its eigenbases."""
    scale = np.abs(exact).max()
    corrected = program["options"]["eigenvalue_correction"]
    fallback = program["options"].get("fallback")
    for layer, ids in layer_ids(curvature):
        flat = ids.ravel()
        found, right = (m[np.ix_(flat, flat)] for m in (dense, exact))
        what = f"of {layer.pattern!r}"
        if layer.block == "dense":
            require(found, right, f"dense block {what}", tolerance, scale)
        elif layer.block == "diagonal":
            right = np.diag(np.diag(right))
            require(found, right, f"diagonal block {what}", tolerance, scale)
        elif layer.block == "kronecker" and corrected:
            require(np.trace(found), np.trace(right), f"trace {what}", tolerance, scale)
            # <E - F, E> = 0: E is F without what is off the diagonal in E's eigenbasis.
            product, square = np.sum(found * right), np.sum(found * found)
            require(square, product, f"projection {what}", 2 * tolerance, scale**2)
        elif layer.block == "none" and not layer.frozen and fallback != "none":
            require(right, np.zeros_like(right), "without influence", tolerance, scale)


def check_single_pair(program, curvature, dense, exact, outputs, tolerance):
    """Of one example, one position and one column, the Kronecker product is the block.

    But not that of a matrix of which a function makes a weight: its gradient is of any rank.
    """
    one_column = program["options"].get("fisher_type") == "empirical" or outputs[0].size == 1
    if len(outputs) > 1 or not one_column:
        return
    for layer, ids in layer_ids(curvature):
        single = layer.positions == 1 and layer.uses == 1 and layer.pattern != "made"
        if layer.block == "kronecker" and single:
            for flat in ids.reshape(layer.stack, -1):
                at = np.ix_(flat, flat)
                claim = f"one pair of {layer.pattern!r}"
                require(dense[at], exact[at], claim, tolerance, np.abs(exact).max())


def check_records(program, curvature, gradients, tolerance):
    """``sum_t a g^T`` is the gradient of every example in every weight."""
    options = {k: v for k, v in program["options"].items() if k == "vmap_over_data"}
    batched = not options.get("vmap_over_data", True)
    example = program["inputs"] if batched else program["inputs"][0]
    model_fn, params = program["model_fn"], program["params"]
    layers = laplax_kfac.find_layers(model_fn, params, example, **options)
    records = jax.jit(
        lambda params, data: laplax_kfac.intermediates_and_gradients(
            model_fn, params, data, loss_fn=program["loss_fn"], **options
        )
    )(params, (program["inputs"], program["targets"]))
    kronecker = {layer.name for layer in layers if layer.block == "kronecker"}
    demand(kronecker == {*records}, f"records of {sorted(records)} for {sorted(kronecker)}")
    scale = np.abs(gradients).max()
    for name, record in records.items():
        layer = layers[name]
        a, g = np.asarray(record.inputs, float), np.asarray(record.gradients, float)
        if layer.stack == 1:
            a, g = a[:, :, None], g[:, :, None]
        weight, *bias = (np.asarray(curvature.space.ids(s)) for s in layer.segments)
        product = np.einsum("nski,nsko->nkio", a, g)
        rows = product.shape[2]
        if layer.bias and weight.shape[1] > rows:  # weight and bias of one leaf
            bias, weight = [weight[:, rows:]], weight[:, :rows]
        claim = f"sum of a g^T of {layer.pattern!r}"
        require(product, gradients[:, weight], claim, tolerance, scale)
        if layer.bias:
            claim = f"sum of g of {layer.pattern!r}"
            require(g.sum(1), gradients[:, bias[0][:, 0]], claim, tolerance, scale)


def check_posterior(program, curvature, dense, logdet, jacobian, tolerance):
    """Determinant and predictive covariance are those of the dense matrix."""
    free = np.ones(len(dense), bool)
    for layer, ids in layer_ids(curvature):
        free[ids.ravel()] = not layer.frozen
    precision = dense[np.ix_(free, free)] + PRIOR_PREC * np.eye(free.sum())
    require(logdet, np.linalg.slogdet(precision)[1], "logdet", 1e-5, 1.0)
    found = laplax_kfac.predictive_covariance(
        curvature,
        program["model_fn"],
        program["params"],
        program["inputs"],
        prior_prec=PRIOR_PREC,
        vmap_over_data=program["options"].get("vmap_over_data", True),
    )
    j = jacobian[:, :, free]
    require(
        found.covariance,
        j @ np.linalg.inv(precision) @ j.swapaxes(1, 2),
        "predictive covariance",
        tolerance,
    )


def check(program, tolerance, parts=("records", "posterior")):
    """Check all claims about a program; `Wrong` names the first that does not hold.

    Args:
        program: Names of a fuzzed program.
        tolerance: Largest error, as a fraction of the largest entry.
        parts: What is checked beside the curvature.
    """
    data = {"input": program["inputs"], "target": program["targets"]}
    if program["weights"] is not None:
        data["weight"] = program["weights"]
    arguments = program["model_fn"], program["params"], data
    options = program["options"] | {"loss_fn": program["loss_fn"]}

    curvature = laplax_kfac.kfac(*arguments, **options)
    check_accounting(curvature, program["params"])
    dense, diagonal, trace, logdet = (np.asarray(x, float) for x in summary(curvature))
    demand(np.isfinite(dense).all(), "finite")
    check_matrix(curvature, dense, diagonal, trace, tolerance)

    outputs, jacobian = jacobians(program)
    exact, gradients = exact_curvature(program, outputs, jacobian)
    if options.get("fisher_type") == "mc":  # no more than consistent: the same draws, whole blocks
        changed = options | {"curvature": "block", "eigenvalue_correction": False}
        exact = np.asarray(laplax_kfac.kfac(*arguments, **changed).to_dense(), float)
    if exact is not None:
        check_blocks(program, curvature, dense, exact, tolerance)
        check_single_pair(program, curvature, dense, exact, outputs, tolerance)
    if "records" in parts:
        check_records(program, curvature, gradients, tolerance)
    if "posterior" in parts:
        check_posterior(program, curvature, dense, logdet, jacobian, tolerance)
