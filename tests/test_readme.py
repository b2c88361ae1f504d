"""The documentation matches the code, and the English and Chinese pages match each other."""

import re
import runpy

import pytest
from conftest import ROOT

COUNT = runpy.run_path(str(ROOT / "docs/count.py"))
PAGES = [path.relative_to(ROOT).as_posix() for folder in ("", "docs", "bench", "course", "ds_configs", "deploy", "examples/*")
         for path in ROOT.glob(f"{folder}/*.md".lstrip("/"))]
PAIRS = [("README.md", "README.zh.md"), ("docs/tour.md", "docs/tour.zh.md"),
         ("deploy/README.md", "deploy/README.zh.md"), ("docs/rl.md", "docs/rl.zh.md")]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def test_lengths():
    """The sizes of files, of the lesson, and of a training run. `python docs/count.py` updates them."""
    listed = {name for _, name in COUNT["ROW"].findall(read("docs/files.md"))}
    assert listed == {path.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "machinery")
                      for path in folder.glob("*.py")}
    for page in ("README.md", "README.zh.md", "docs/files.md"):
        assert read(page) == COUNT["update"](read(page)), page
    training = {name for _, name in COUNT["ROW"].findall(read("docs/files.md").split("## Not needed")[0])}
    assert {path.relative_to(ROOT).as_posix() for path in COUNT["closure"](ROOT, "train_vla.py")} == training
    assert [name for _, name in COUNT["ROW"].findall(read("README.md"))] == COUNT["LESSON"]
    assert COUNT["count_lines"](ROOT / name for name in COUNT["LESSON"]) <= 1000
    assert len(read("README.md").splitlines()) <= 140


def test_files_it_names_exist():
    found = 0
    for page in PAGES:
        here = (ROOT / page).parent
        named = re.findall(r"`((?:\w+/)+[\w.+-]+\.(?:py|json|yaml|md))`", read(page))
        links = re.findall(r"\]\(([\w/.+-]+)(?:#[\w-]+)?\)", read(page))
        missing = [name for name in named if not any((root / name).exists() for root in (ROOT, here))
                   and not name.startswith(("prismatic/", "vla-scripts/", "meta/", "runs/"))]
        missing += [link for link in links if not (here / link).exists()]
        assert not missing, (page, missing)
        found += len(named) + len(links)
    assert found > 75


def test_anchors_exist():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([\w/.+-]*)#([\w-]+)\)", read(page)):
            target = (ROOT / page).parent / link if link else ROOT / page
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            titles = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in titles, (page, anchor)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_english_and_chinese_agree(english, chinese):
    """Code blocks, file names, keys, links (except the language), and numbers."""
    first, second = read(english), read(chinese).split("## 附录")[0]  # Chinese only: libraries, terms, mirrors
    blocks = [re.findall(r"```\w+\n.*?```", text, re.DOTALL) for text in (first, second)]
    assert blocks[0] == blocks[1]
    first, second = (re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL) for text in (first, second))
    for pattern in (r"`[^`\n]+`", r"\]\(([\w/.:-]+)", r"(?a:(?<![\w.])\d[\d,.]*(?:e-?\d+)?(?!\w))"):
        ours, theirs = ({one.replace(".zh", "").rstrip(".,") for one in re.findall(pattern, text)}
                        for text in (first, second))
        assert ours == theirs, pattern


def test_pictures_are_drawn_by_the_script(tmp_path):
    drawing = runpy.run_path(str(ROOT / "docs/draw.py"))
    drawing["sequence"].__globals__["FOLDER"] = tmp_path
    for language, ending in (("en", ""), ("zh", ".zh")):
        words = drawing["WORDS"][language]
        drawing["sequence"](words, f"sequence{ending}.svg")
        drawing["data"](words, drawing["CHAIN"][language], f"data{ending}.svg")
        drawing["zero"](words, f"zero{ending}.svg")
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "docs" / path.name).read_text(), path.name
