"""The house: imports follow the data, from what comes first to what comes later."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import laplax_kfac

ROOT = Path(laplax_kfac.__file__).parent
ORDER = [
    "arguments", "summaries", "pytrees", "machine", "caches", "progress", "files", "remeshing",
    "meshes", "jaxprs", "gram", "faults", "patterns", "bases", "parsing", "blocks", "likelihood",
    "fisher", "capture", "factors", "posterior", "curvature", "evidence", "predictive",
    "laplax_adapter",
]  # fmt: skip
SIDE_ROOMS = ["report", "checkpoint", "links", "masks", "plotting"]  # nobody reads these


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imports(name):
    """The modules of the package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in TREES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {other for other in found if other in TREES and other != name}


def floor(name):
    """The folder, or the module at the root, that a module belongs to; None for the package."""
    _, _, inside = name.partition(".")
    return inside.split(".")[0] or None


def test_every_folder_has_a_place():
    assert {floor(name) for name in TREES} - {None} == {*ORDER, *SIDE_ROOMS} & {
        path.stem for path in ROOT.iterdir()
    }


@pytest.mark.parametrize("name", [name for name in TREES if floor(name)])
def test_no_import_points_up(name):
    below = [floor(other) for other in imports(name)]
    assert None not in below, f"{name} imports from the package itself"
    if floor(name) in SIDE_ROOMS:
        assert not {*below} & {*SIDE_ROOMS} - {floor(name)}
        return
    place = ORDER.index(floor(name))
    later = [other for other in below if other in SIDE_ROOMS or ORDER.index(other) > place]
    assert not later, f"{name} imports from {later}"


def test_there_is_no_cycle():
    left = {name: imports(name) for name in TREES}
    # A folder's `__init__` is run before its modules, and gathers what they offer.
    while left:
        free = [name for name, below in left.items() if not below & left.keys()]
        assert free, f"cyclic: {sorted(left)}"
        for name in free:
            del left[name]


def test_every_module_can_be_imported_and_says_what_it_is_for():
    for info in pkgutil.walk_packages([str(ROOT)], "laplax_kfac."):
        assert importlib.import_module(info.name).__doc__, info.name


def test_folders_say_what_goes_in_and_what_comes_out():
    for folder in ORDER:
        if (ROOT / folder).is_dir():
            text = importlib.import_module(f"laplax_kfac.{folder}").__doc__ or ""
            assert "out" in text.lower(), folder
