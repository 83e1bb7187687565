"""The page of what is recognised is what the catalogue says."""

from support import recognised
from support.models import MODELS


def test_the_page_is_up_to_date():
    found = recognised.PAGE.read_text()
    assert found == recognised.page(), f"rewrite the page: {recognised.COMMAND}"


def test_every_model_has_a_row():
    rows = [line for line in recognised.page().splitlines() if line.startswith("| ")]
    headings = [line for line in rows if line.startswith("| model |")]
    assert len(rows) - len(headings) == len(MODELS)
