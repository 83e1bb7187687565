"""What laplax must have, and what is said where it has not."""

import functools

import laplax
import laplax.api
import laplax.register
import pytest

from laplax_kfac import laplax_adapter

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    ("path", "change", "lacks"),
    [
        ("register.register_curvature_method", None, r"register\.register_curvature_method"),
        ("curv.cov.CURVATURE_METHODS", None, r"laplax\.curv\.cov\.CURVATURE_METHODS"),
        ("api.laplace", lambda model_fn, params: (model_fn, params), r"laplace\(data, loss_fn, "),
        ("api.laplace", functools.partial(print), r"laplace\(model_fn, params, data, loss_fn, cur"),
        ("__version__", "0.0.1", r"laplax 0\.0\.1, which lacks much that 0\.0\.2 has"),
    ],
    ids=["register", "a dictionary", "parameters", "no function", "version"],
)  # fmt: skip
def test_a_laplax_that_cannot_be_registered_with_is_refused(path, change, lacks, monkeypatch):
    replace(monkeypatch, path, change)
    with pytest.raises(ImportError, match=f"{lacks}.*; install laplax 0\\.0\\.2, or a later"):
        laplax_adapter.register()


@pytest.mark.parametrize(
    ("path", "change", "lacks"),
    [
        ("eval.pushforward.set_output_mv", None, r"laplax\.eval\.pushforward\.set_output_mv"),
        (
            "api.evaluate_metrics_on_dataset", lambda **given: given,
            r"laplax\.api\.evaluate_metrics_on_dataset\(pred_fn, data\)",
        ),
        (
            "eval.pushforward.get_dist_state",
            lambda mean_params, posterior_state: (mean_params, posterior_state),
            r"laplax\.eval\.pushforward\.get_dist_state\(model_fn\)",
        ),
    ],
    ids=["a function", "parameters", "parameter"],
)  # fmt: skip
def test_a_laplax_without_its_pushforward_is_slow_and_a_warning_says_so(
    path, change, lacks, monkeypatch
):
    replace(monkeypatch, path, change)
    with pytest.warns(UserWarning, match=f"lacks {lacks}.*: .* are right but slow"):
        laplax_adapter.register()


def replace(monkeypatch, path, change):
    *modules, name = path.split(".")
    module = functools.reduce(getattr, modules, laplax)
    if change is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, change)
