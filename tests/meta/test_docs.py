"""What the documentation points at exists."""

import re
from pathlib import Path

import pytest

LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """The fragments that a page's headings offer, by GitHub's rule."""
    titles = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(FENCE.sub("", markdown))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, repository: Path, committed_files: list[Path]) -> list[str]:
    """Relative links of a page (a path in the repository) that lead to no committed file, folder or heading."""
    files = {repository / path for path in committed_files}
    targets = files | {parent for path in files for parent in path.parents}
    broken = []
    for link in LINK.findall(FENCE.sub("", (repository / page).read_text(encoding="utf-8"))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (repository / page.parent / name).resolve() if name else repository / page
        missing_heading = (
            fragment
            and target.suffix == ".md"
            and target in files
            and fragment not in anchors(target.read_text("utf-8"))
        )
        if target not in targets or missing_heading:
            broken.append(f"{page}: {link}")
    return broken


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/other.md").write_text("# One `two`, three\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(
        "[a](docs/other.md) [b](docs/other.md#one-two-three) [c](docs) [d](https://example.org/x)\n"
        "[e](missing.md) ![f](docs/missing.png) [g](docs/other.md#four) [h](../outside.md)\n"
        "```\n[i](also-missing.md)\n```\n",
        encoding="utf-8",
    )
    found = broken_links(Path("page.md"), tmp_path, [Path("page.md"), Path("docs/other.md")])
    assert found == [
        "page.md: missing.md",
        "page.md: docs/missing.png",
        "page.md: docs/other.md#four",
        "page.md: ../outside.md",
    ]


def test_links_resolve(repository: Path, committed_files: list[Path]) -> None:
    pages = [path for path in committed_files if path.suffix == ".md"]
    assert Path("README.md") in pages
    assert [link for page in pages for link in broken_links(page, repository, committed_files)] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_make_targets_that_a_page_names_exist(page: str, repository: Path) -> None:
    named = set(COMMAND.findall((repository / page).read_text(encoding="utf-8")))
    assert "test" in named
    assert named <= set(TARGET.findall((repository / "Makefile").read_text(encoding="utf-8")))


def test_the_tests_that_the_promises_of_serving_name_exist(repository: Path) -> None:
    named = 0
    for row in re.findall(
        r"^\| R\d+ \|.*$", (repository / "docs/serving.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        file = None
        for word in re.findall(r"`([^`]+)`", row.rpartition(" | ")[2]):
            if word.endswith(".py") or ".py::" in word:
                file, _, word = word.partition("::")
                source = (repository / "tests/serving" / file).read_text(encoding="utf-8")
            if word.startswith("test_"):
                assert f"def {word.removesuffix('*')}" in source, (file, word)
                named += 1
    assert named > 20
