"""The course: its exercises, their checks, and what its notebooks hold."""

import ast
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from students import ANSWERS

COURSE = ROOT / "course"
NUMBERS = range(1, 9)
STALE = "the lesson has changed: run python course/build.py"
LESSONS = sorted((COURSE / "lessons").glob("*.py"))


def load_check():
    spec = importlib.util.spec_from_file_location("course_check", COURSE / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECK = load_check()


@pytest.fixture(autouse=True)
def project_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def template(number: int) -> str:
    return (COURSE / f"exercises/exercise_{number}.py").read_text()


def verdict(number: int, answer: str, folder, language: str = "en") -> tuple[bool, str]:
    """The check of a template whose function is `answer`."""
    path = folder / f"exercise_{number}.py"
    path.write_text(template(number).partition("\ndef ")[0] + "\n" + answer)
    return CHECK.check(number, path, language)


def own(number: int) -> str:
    return CHECK.answer(CHECK.load_case(number))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_exercise_is_red_until_it_is_answered(number, tmp_path):
    """With the project's own function in the template it is right, and so is a student's way to write it."""
    case = CHECK.load_case(number)
    right, line = CHECK.check(number, COURSE / f"exercises/exercise_{number}.py", "en")
    assert not right and case.NAME in line
    for answer in (own(number), ANSWERS[number][0]):
        right, line = verdict(number, answer, tmp_path)
        assert right, line
    assert getattr(case.OWNER, case.NAME) is CHECK.original(case)  # the project's own is back
    theirs, ours = (ast.parse(text).body[-1].args for text in (template(number), own(number)))
    assert [arg.arg for arg in theirs.args] == [arg.arg for arg in ours.args]


@pytest.mark.parametrize("number", NUMBERS)
def test_typical_mistakes_are_named(number, tmp_path):
    answer, mistakes = ANSWERS[number]
    missed, named = [], 0
    for old, new, word in mistakes:
        assert old in answer, old
        right, line = verdict(number, answer.replace(old, new), tmp_path)
        assert not right and "\n" not in line, (old, new)
        if word in line:
            named += word != "expected"  # the fallback
        else:
            missed.append((new, word, line))
    assert not missed
    assert named >= 5
    for *_, english, chinese in CHECK.load_case(number).MISTAKES:
        assert english.isascii() or "²" in english or "√" in english
        assert re.search("[\u4e00-\u9fff]", chinese)


def test_other_mistakes_show_the_first_difference(tmp_path):
    """An error names the student's line; a syntax error too."""
    right, line = verdict(1, own(1).replace("- bin_numbers", "- bin_numbers * 2"), tmp_path)
    assert not right and "expected 319" in line
    right, line = verdict(1, "def encode(self, actions):\n    return actoins\n", tmp_path)
    number = (tmp_path / "exercise_1.py").read_text().split("\n").index("    return actoins") + 1
    assert not right and f"line {number}: NameError" in line
    _, line = verdict(1, own(1).replace("- bin_numbers", "- bin_numbers - 1"), tmp_path, "zh")
    assert "差一个区间" in line
    right, line = verdict(1, "def encode(self, actions)\n", tmp_path)
    assert not right and "SyntaxError" in line


def test_no_mistake_is_named_falsely(tmp_path, monkeypatch):
    """An error or a loop without an end is said to be one, with its line."""
    monkeypatch.setattr(CHECK, "LIMIT", 2)
    for number, old, new, words in (
            (2, 'self.projector["projector"](features)', "self.projector(features)", "NotImplementedError: Module"),
            (3, "permute(index,", "permute(visit,", "no answer after 2 seconds"),
            (5, "cfg.global_batch_size % micro_batch", "micro_batch % cfg.global_batch_size", "UserError: global"),
            (6, "scaled = 0.5 * (actions + 1)", "actions += 1; scaled = 0.5 * actions", "expected 1.0, got 2.0"),
            (7, ".argmax()", ".argmin()", "expected 767, got 0"),
            (1, "def encode", "def encoded", "no attribute 'encode'")):
        right, line = verdict(number, own(number).replace(old, new), tmp_path)
        assert not right and "\n" not in line and words in line, line


def test_the_command_makes_the_students_file(tmp_path):
    """In a copy of the course. A file that is already there stays as it is."""
    shutil.copytree(COURSE, tmp_path / "course", ignore=shutil.ignore_patterns("my", "*.ipynb"))
    path = tmp_path / "course/my/exercise_1.py"
    command = [sys.executable, "course/check.py", "1"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1 and "course/my/exercise_1.py" in found.stdout
    assert path.read_text() == template(1)


# ---- The notebooks -------------------------------------------------------------------------------


def normal(function: ast.AST) -> str:
    """A function's body, without its docstring and names of layout."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return "\n".join(ast.unparse(node) for node in body)


def functions(source: str) -> list[ast.AST]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def test_no_cell_holds_a_copy():
    """No function of a cell, and no three lines in a row, stand in a file of the project."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("machinery/*.py"), *ROOT.glob("examples/*/*.py")]
    known, triples = set(), set()
    for path in files:
        source = path.read_text()
        known |= {body for body in map(normal, functions(source)) if len(body) > 60}
        triples |= set(three_lines(source))
    for path in LESSONS:
        code = "\n".join(part.partition("\n")[2] for part in path.read_text().split("# %%")[1:]
                         if part.startswith("\n"))
        assert not {normal(one) for one in functions(code)} & known, path.name
        assert not set(three_lines(code)) & triples, path.name


def three_lines(source: str) -> list[str]:
    """All runs of three lines that do something (imports and short lines do not count)."""
    lines = [line.partition("  #")[0].strip() for line in source.split("\n")]
    lines = [line for line in lines if len(line) > 25 and not line.startswith(("#", "import ", "from ", '"""'))]
    return ["\n".join(lines[i : i + 3]) for i in range(len(lines) - 2)]


@pytest.mark.parametrize("folder", ["", "zh"])
@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in LESSONS])
def test_figures_are_printed(lesson, folder):
    """The committed notebook belongs to its lesson, was run without an error, and prints the figures
    that its text quotes: every number with a decimal point or a thousands comma, or of four digits.
    Its links lead to files."""
    book = json.loads((COURSE / folder / f"{lesson.stem}.ipynb").read_text())
    outputs, texts, codes = "", [], []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(text)
            continue
        codes.append(text)
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            outputs += "".join(output.get("text", ""))
    for part in lesson.read_text().split("# %%")[1:]:
        kind, _, body = part.partition("\n")
        if not kind.strip():
            assert body.strip() in codes, STALE
        elif kind.strip() == (folder or "en"):
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.partition("{answer}")[0].split("\n")]
            assert "\n".join(lines).strip("# \n") in "\n".join(texts), STALE
    assert len(codes) == 1 + lesson.read_text().count("# %%\n"), STALE
    prose = re.sub(r"```.*?```", "", "\n".join(texts), flags=re.DOTALL)
    for link in re.findall(r"\]\(([\w/.+-]+)\)", prose):
        assert (COURSE / folder / link).exists(), link
    saw = [text.partition("<details>")[0] for text in texts if "What you saw" in text or "看到了什么" in text]
    assert len(saw) >= 1
    for text in saw:
        for figure in re.findall(r"(?<![\w.])\d+\.\d+|\d{1,3}(?:,\d{3})+|(?<![\w.])\d{4,}", text):
            code_or_text = outputs + source_numbers(book)
            assert figure in code_or_text, (lesson.name, figure)


def source_numbers(book: dict) -> str:
    """The code, whose numbers the text may repeat."""
    return "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")


def test_lines_fit_a_notebook():
    """Longer lines of code are cut off at the cell's edge."""
    for path in LESSONS:
        for part in path.read_text().split("# %%")[1:]:
            if part.startswith("\n"):
                assert not [line for line in part.split("\n") if len(line) > 100], path.name


@pytest.mark.parametrize("folder", ["course", "course/zh", "elsewhere"])
def test_the_first_cell_finds_the_project(folder, tmp_path):
    """From a notebook's folder, and from Colab's: there, the project is a folder beside the notebook."""
    book = json.loads((COURSE / "1_number.ipynb").read_text())
    first = next("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    here = ROOT / folder
    if folder == "elsewhere":
        here = tmp_path
        (tmp_path / "zerovla").symlink_to(ROOT)
    code = first + "\nimport inspect\nprint(Path.cwd().resolve(), inspect.getsourcefile(show))"
    found = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(ROOT), str(COURSE / "begin.py")] or folder == "elsewhere"
    assert found.stdout.startswith(str(ROOT))


def test_the_two_readmes_agree():
    """Commands, exercises, and numbers."""
    pages = [(COURSE / name).read_text() for name in ("README.md", "README.zh.md")]
    for pattern in (r"```\w+\n.*?```", r"\| `[\w.]+` \| [\d.]+ \|", r"(?<![\w.])\d+(?:\.\d+)?(?= (?:minutes|分钟))"):
        english, chinese = (re.findall(pattern, page, re.DOTALL) for page in pages)
        assert english == chinese and english, pattern


def test_it_is_small():
    books = [*COURSE.glob("*.ipynb"), *COURSE.glob("zh/*.ipynb")]
    assert len(books) == 16
    assert sum(path.stat().st_size for path in books) < 1.5e6


@pytest.mark.parametrize("lesson", [1, 2, 3, 4])
def test_cells_print_what_the_notebook_shows(lesson, capsys):
    """The lessons that take seconds. The notebook's cells, one after another, in this process."""
    from course.begin import show

    (path,) = COURSE.glob(f"lessons/{lesson}_*.py")
    runpy.run_path(str(path), {"show": show})
    printed = re.findall(r"\d[\d.,]*\d", capsys.readouterr().out)
    book = json.loads(next(COURSE.glob(f"{lesson}_*.ipynb")).read_text())
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    shown = re.findall(r"\d[\d.,]*\d", "".join("".join(output.get("text", "")) for output in outputs))
    assert len(shown) > 15
    # last digits of float32 differ from processor to processor
    assert sum(ours != theirs for ours, theirs in zip(printed, shown, strict=True)) <= len(shown) // 20


@pytest.mark.slow
@pytest.mark.parametrize("lesson", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_lesson_runs(lesson, tmp_path):
    """As `make course`, but the notebooks that are committed stay."""
    pytest.importorskip("nbclient")
    code = ("import sys; sys.path.insert(0, 'course'); import build; "
            f"path, = build.FOLDER.glob('lessons/{lesson}_*.py'); build.run(build.notebook(path, 'en'))")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=1800)
