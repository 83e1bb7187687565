"""Names of our curvature types in any case, wherever laplax looks one up."""

import copy
import pickle

import laplax
import laplax.api
import laplax.register
import pytest
from laplax.enums import CurvApprox

from laplax_kfac.laplax_adapter import spelling

pytestmark = pytest.mark.usefixtures("x64")


def test_the_types_are_members_of_the_enumeration():
    assert CurvApprox.KFAC is CurvApprox("kfac")
    assert isinstance(CurvApprox("ekfac"), CurvApprox)
    assert CurvApprox("kfac") == "kfac"
    assert CurvApprox("kfac").name == "KFAC"
    assert pickle.loads(pickle.dumps(CurvApprox.KFAC)) is CurvApprox.KFAC
    assert copy.deepcopy(CurvApprox.KFAC) is CurvApprox.KFAC
    assert list(CurvApprox) == ["full", "diagonal", "lanczos", "lobpcg"]  # an enumeration is closed
    with pytest.raises(ValueError, match="'other' is not a valid CurvApprox"):
        CurvApprox("other")


def test_a_type_registered_with_ours_as_its_default_is_a_member_by_value():
    laplax.register.register_curvature_method("OfMyOwn", default="KFAC")
    assert isinstance(CurvApprox("ofmyown"), CurvApprox)
    assert CurvApprox("ofmyown") == "OfMyOwn"
    assert CurvApprox("OFMYOWN") is CurvApprox("ofmyown")
    laplax.register.register_curvature_method("theirs", default="full")
    with pytest.raises(ValueError, match="'theirs' is not a valid CurvApprox"):
        CurvApprox("theirs")


def test_tables_are_laplax_own_and_find_our_names_only():
    table = laplax.curv.cov.CURVATURE_METHODS
    assert laplax.register.CURVATURE_METHODS.data is table.data
    assert [name for name in table if name.lower() == "kfac"] == ["kfac"]
    assert table["kFaC"] is table["kfac"]
    for unknown in ("FULL", "kfacs", None, 3):
        with pytest.raises(KeyError, match=str(unknown)):
            table[unknown]
    table["added"] = table["full"]
    assert table.data.pop("added") is table["full"]
    assert "added" not in table
    spelling.in_any_case()
    assert laplax.curv.cov.CURVATURE_METHODS.data is table.data
