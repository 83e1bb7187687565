"""The Python blocks of the README and of the documentation run, in order, one namespace a page.

A comment `<!-- needs: name -->` before a block leaves it out where that package is not installed. A
block of text right below is what it prints; numbers may differ a little between machines.
"""

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import laplax_kfac

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}


@pytest.fixture
def single_precision():
    """As before a page that changes it."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if BLOCK.search(text)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(PAGES[page]):
        if block[1] and find_spec(block[1]) is None:
            continue
        line = PAGES[page].count("\n", 0, block.start(2))
        source = "\n" * line + block[2]  # tracebacks then show the line of the page
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, ROOT / page, "exec"), namespace)
        if block[3]:
            compare(printed.getvalue(), block[3])


def compare(printed, told):
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", told)
    found, expected = ([float(x) for x in NUMBER.findall(text)] for text in (printed, told))
    assert found == pytest.approx(expected, rel=0.1, abs=0.01)


@pytest.mark.parametrize("printed", ["AUROC 0.5\n", "AUC 0.9\n", "AUROC 0.9 0.9\n", ""])
def test_other_output_is_noticed(printed):
    compare("AUROC 0.91\n", "AUROC 0.9\n")
    with pytest.raises(AssertionError):
        compare(printed, "AUROC 0.9\n")


def test_blocks_are_found():
    text = (
        "a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n"
        "<!-- needs: torch -->\n```python\n\ny = 2\n```\n"
    )
    assert BLOCK.findall(text) == [("", "x = 1\n", ""), ("torch", "\ny = 2\n", "")]
    assert BLOCK.findall("```python\nx\n```\n\n```text\n1\n```\n") == [("", "x\n", "1\n")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_is_short_and_shows_the_ways_in():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    (commands,) = re.findall(r"```bash\n(make .*?)```", text, re.DOTALL)
    assert re.findall(r"^(make \w+)", commands, re.MULTILINE) == ["make quickstart", "make test"]


@pytest.mark.parametrize(
    "term",
    ["flax", "equinox", "haiku", "keras", "LoRA", "dropout", "batch norm", "OOD", "GPU", "NaN",
     "memory"],
)  # fmt: skip
def test_what_users_search_for_has_a_page(term):
    in_docs = [page for page, text in PAGES.items() if term.lower() in text.lower()]
    assert [page for page in in_docs if page not in ("README.md", "docs/architecture.md")]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f": {page.name}\n" in navigation


def test_every_public_name_is_on_the_page_of_the_api():
    text = (ROOT / "docs/api.md").read_text()
    for name in set(laplax_kfac.__all__) - {"likelihood", "masks", "patterns"}:
        assert f"::: laplax_kfac.{name}\n" in text
    for name in set(laplax_kfac.likelihood.__all__) - {"Likelihood", "resolve_likelihood"}:
        assert re.search(rf"::: laplax_kfac\.likelihood\.\w+\.{name}\n", text)
