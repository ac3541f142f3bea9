"""Links between the project's documents lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "docs", "docs/results", "zoo/*/*") for path in ROOT.glob(f"{folder}/*.md")
)


def headings(document):
    """What links to headings are made of, as GitHub makes it: lower case, hyphens, no punctuation."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


def broken(document):
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (heading and heading not in headings(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_lead_somewhere(document):
    assert broken(document) == []


def test_there_are_documents_to_check():
    assert len(DOCUMENTS) > 15


def test_a_broken_link_is_found(tmp_path):
    there = tmp_path / "there.md"
    there.write_text("# What `it` is, twice\n\n```sh\n# not\n```\n")
    here = tmp_path / "here.md"
    here.write_text(
        "[a](there.md) [b](there.md#what-it-is-twice) [c](https://x.y/z.md) [d](gone.md) [e](there.md#not)\n"
    )
    assert broken(here) == ["gone.md", "there.md#not"]
