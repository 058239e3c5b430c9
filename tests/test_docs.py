"""What the documentation promises to be there is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def faults(text: str, folder: Path) -> list[str]:
    """Placeholders, and links to files that are not there."""
    found = re.findall(r"@@\w+@@|TO FILL IN|TODO|FIXME", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.split("#")[0]
        if path and "://" not in path and not (folder / path).exists():
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_are_finished_and_their_links_lead_somewhere(page):
    assert faults(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_check_can_fail(tmp_path):
    text = "@@TABLE@@ [a](missing.md) [b](here.md#part) [c](https://example.org/x.md)"
    (tmp_path / "here.md").touch()
    assert faults(text, tmp_path) == ["@@TABLE@@", "missing.md"]
