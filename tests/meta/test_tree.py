"""Rules on the committed files themselves."""

import re
from pathlib import Path

MAX_LINES = 400
# A file may exceed the limit only with a reason beside its name here.
LONG_FILES: dict[str, str] = {}

# Folders that exist on one person's or one service's machine; a pattern, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$})/~-])/(?:home|Users|root(?!/[.]cache/)|work|scratch)/[\w.]")


def test_modules_are_short(repository: Path, committed_files: list[Path]) -> None:
    modules = [path for path in committed_files if path.suffix == ".py"]
    assert modules
    lengths = {str(path): len((repository / path).read_text(encoding="utf-8").splitlines()) for path in modules}
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES and name not in LONG_FILES}
    assert too_long == {}, f"split these by idea (limit {MAX_LINES} lines)"
    assert {name for name in LONG_FILES if lengths.get(name, 0) <= MAX_LINES} == set(), (
        "no longer long: remove the entry"
    )


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
