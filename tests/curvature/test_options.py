"""The record of options: checked where it is made, changed by keywords, turned into settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplax_kfac
from laplax_kfac.curvature.options import OptionKeywords, Options

BAD = [
    ({"fisher_type": "type3"}, "type3"),
    ({"curvature": "dense"}, "curvature"),
    ({"kfac_approx": "extend"}, "kfac_approx"),
    ({"kfac_approx": {"dense*": "sum"}}, "kfac_approx"),
    ({"mc_samples": 0}, "mc_samples"),
    ({"sketches": 0}, "sketches"),
    ({"sketches": 4, "fisher_type": "mc"}, "sketches"),
    ({"fisher_type": "forward_only", "curvature": "diagonal"}, "forward_only"),
    ({"nonfinite": "ignore"}, "nonfinite"),
    ({"fallback": "full"}, "fallback"),
    ({"factor_kinds": "blockd:4"}, "factor_kinds"),
]


@pytest.mark.parametrize(("keywords", "named"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_options_are_refused_when_they_are_made_and_when_they_are_changed(keywords, named):
    with pytest.raises(ValueError, match=named):
        Options(**keywords)
    with pytest.raises(ValueError, match=named):
        Options.of(Options(), keywords)


def test_keywords_change_a_copy_and_nothing_else():
    options = Options(mc_samples=3, fisher_type="mc")
    changed = Options.of(options, {"mc_samples": 5})
    assert (options.mc_samples, changed.mc_samples, changed.fisher_type) == (3, 5, "mc")
    assert Options.of(None, {}) is not None
    assert Options.of(options, {}).fisher_type == "mc"


def test_an_unknown_keyword_names_the_nearest_option():
    with pytest.raises(TypeError, match="did you mean 'fisher_type'"):
        Options.of(None, {"fischer_type": "mc"})


def test_options_must_be_options():
    with pytest.raises(TypeError, match=r"laplax_kfac\.Options"):
        Options.of({"fisher_type": "mc"}, {})  # type: ignore[arg-type]


def test_the_keywords_that_functions_take_are_the_attributes():
    assert set(OptionKeywords.__annotations__) == set(Options.__dataclass_fields__)


def layers_named(*names):
    params = {name: jnp.ones((2, 2)) for name in names}

    def model_fn(input, params):
        return sum(input @ weight for weight in params.values())

    return laplax_kfac.find_layers(model_fn, params, jnp.ones(2))


def test_settings_say_what_a_layer_gets_by_the_first_pattern_that_it_matches():
    options = Options(kfac_approx={"conv*": "reduce", "conv1": "expand", "head": "reduce"})
    settings = options.settings("mse")
    found = {x.name: settings.kfac_approx_for(x) for x in layers_named("conv1", "head", "body")}
    assert found == {"conv1": "reduce", "head": "reduce", "body": "expand"}


def test_patterns_of_no_layer_are_refused_by_name():
    settings = Options(kfac_approx={"deconv*": "reduce"}).settings("mse")
    with pytest.raises(ValueError, match="deconv"):
        settings.check_layers(layers_named("conv1"))


def test_the_key_is_that_of_zero_unless_one_is_given():
    given = jax.random.key(7)
    for options, wanted in ((Options(), jax.random.key(0)), (Options(key=given), given)):
        data = jax.random.key_data(options.settings("mse").key)
        np.testing.assert_array_equal(data, jax.random.key_data(wanted))
