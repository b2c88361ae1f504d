"""What the README says of the code is true of the code."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def lines(name: str) -> int:
    return (ROOT / name).read_text().count("\n")


def test_line_counts():
    training, rest = README.split("*and not needed to train:*")
    row = re.compile(r"^\| `(\w+\.py)` \| (\d+) \|", re.MULTILINE)
    tour = dict(row.findall(training)) | dict(row.findall(rest))
    assert set(tour) == {path.name for path in ROOT.glob("*.py")}
    assert {name: int(count) for name, count in tour.items()} == {name: lines(name) for name in tour}
    files, count = re.search(r"\| (\d+) files, ([\d,]+) lines \|$", README, re.MULTILINE).groups()
    core = [name for name, _ in row.findall(training)]
    assert (int(files), int(count.replace(",", ""))) == (len(core), sum(lines(name) for name in core))


def test_files_it_names_exist():
    named = re.findall(r"`((?:\w+/)+[\w.+-]+\.(?:py|json|yaml|md))`", README)
    links = re.findall(r"\]\(([\w/.]+)\)", README)
    missing = [name for name in [*named, *links] if not (ROOT / name).exists()]
    assert len(named) + len(links) > 5 and not missing
