"""Rules on the committed files themselves."""

import re
from pathlib import Path

# Folders that exist on one person's or one service's machine; a pattern, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$})/~-])/(?:home|Users|root(?!/[.]cache/)|work|scratch)/[\w.]")


def test_machine_paths_are_recognised() -> None:
    def path(*parts: str) -> str:
        return "/" + "/".join(parts)

    assert MACHINE_PATH.search(f"open('{path('home', 'ann', 'x')}')")
    assert MACHINE_PATH.search(f"see {path('work', 'main')}")
    assert not MACHINE_PATH.search("https://example.org" + path("home", "page"))
    assert not MACHINE_PATH.search("docs" + path("work", "notes.md"))


def test_no_file_names_a_path_of_one_machine(repository: Path, committed_files: list[Path]) -> None:
    texts = {path: (repository / path).read_bytes() for path in committed_files}
    found = [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, data in texts.items()
        if b"\0" not in data
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []
