"""The Python blocks of the README and of the documentation run, in order, one namespace a page.

A comment `<!-- needs: name -->` before a block leaves it out where that package is not installed.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if BLOCK.search(text)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(PAGES[page]):
        if block[1] and find_spec(block[1]) is None:
            continue
        line = PAGES[page].count("\n", 0, block.start(2))
        source = "\n" * line + block[2]  # tracebacks then show the line of the page
        exec(compile(source, ROOT / page, "exec"), namespace)


def test_blocks_are_found():
    text = (
        "a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n"
        "<!-- needs: torch -->\n```python\n\ny = 2\n```\n"
    )
    assert BLOCK.findall(text) == [("", "x = 1\n"), ("torch", "\ny = 2\n")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_is_short_and_shows_the_ways_in():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    (commands,) = re.findall(r"```bash\n(make .*?)```", text, re.DOTALL)
    assert re.findall(r"^(make \w+)", commands, re.MULTILINE) == ["make quickstart", "make test"]
