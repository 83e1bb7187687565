"""The adapter: the only folder that knows laplax; it registers our curvature types there.

In: laplax, and all steps before this one. Out: the curvature types ``"kfac"``, ``"ekfac"`` and
``"kfoc"`` of laplax. The contract is laplax's: six functions a curvature type
(``curvature_types.py``), found by name (``spelling.py``), of a product with the GGN matrix that
carries its problem (``problem.py``). ``closed_form.py`` and ``predictions.py`` make laplax's
predictions fast. No function of laplax is changed: see ``rebinding.py``.
"""

from laplax_kfac.laplax_adapter.calibration import calibrate
from laplax_kfac.laplax_adapter.closed_form import setup_linearised
from laplax_kfac.laplax_adapter.curvature_types import CURVATURE_TYPES
from laplax_kfac.laplax_adapter.registration import register
from laplax_kfac.laplax_adapter.requirements import metrics, predictives

__all__ = [
    "CURVATURE_TYPES",
    "calibrate",
    "metrics",
    "predictives",
    "register",
    "setup_linearised",
]
