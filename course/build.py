"""Make the course's notebooks from the texts in lessons/, and run them.

    python course/build.py            # all eight, in English and Chinese
    python course/build.py 3 4        # some lessons

A lesson is one text for both languages: `# %%` begins a cell of code, `# %% en` and `# %% zh` a cell
of text whose lines begin with "# ". The code is run once; both notebooks get its output. A cell that
raises ends the build. The line `# {answer}` becomes the project's own function, folded away, so that
no answer is written down twice.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import check

LANGUAGES = {"en": FOLDER, "zh": FOLDER / "zh"}
LIMIT = 900  # seconds for a cell
BEGIN = '''\
# Run this cell first. It goes to the project's folder, from wherever this notebook is.
import os
import sys
from pathlib import Path

here = [Path.cwd(), *Path.cwd().parents, *Path.cwd().glob("*/")]
project = next(folder for folder in here if (folder / "train_vla.py").exists())
os.chdir(project)
sys.path.insert(0, str(project))
os.environ["DS_ACCELERATOR"] = "cpu"  # the course needs no GPU

from course.begin import show  # prints lines of the project's files'''
FOLDED = {"en": ("The answer, as it is in", "{path}"), "zh": ("答案：", "{path} 里的原文")}


def cells(path: Path, language: str) -> list[tuple[str, str]]:
    """A lesson's cells in one language: [("code" or "text", source), ...]."""
    found = [("code", BEGIN)]
    for part in path.read_text().split("# %%")[1:]:
        kind, _, body = part.partition("\n")
        if kind.strip() == language:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n")]
            text = "\n".join(lines).replace("{answer}", answer(path, language))
            found.insert(0 if len(found) == 1 else len(found), ("text", text))
        elif not kind.strip():
            found.append(("code", body.strip()))
    return found


def answer(path: Path, language: str) -> str:
    """The project's function that the lesson's exercise asks for, folded away."""
    case = check.load_case(number_of(path))
    before, after = FOLDED[language]
    place = f"<code>{check.file_of(case)}</code>"  # HTML: Markdown is not read here
    return (f"<details><summary>{before} {after.format(path=place)}</summary>\n\n"
            f"```python\n{check.answer(case)}```\n\n</details>")


def number_of(path: Path) -> int:
    """lessons/3_order.py -> 3"""
    return int(path.name.partition("_")[0])


def notebook(path: Path, language: str) -> nbformat.NotebookNode:
    """A lesson's notebook, not run yet."""
    book = nbformat.v4.new_notebook()
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for i, (kind, source) in enumerate(cells(path, language)):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        book.cells.append(new(source, id=f"cell-{i}"))
    return book


def run(book: nbformat.NotebookNode) -> list[list]:
    """Run a notebook's cells -> the outputs of each cell of code. stderr is left out: it holds
    libraries' warnings and progress bars."""
    client = NotebookClient(book, timeout=LIMIT, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    outputs = []
    for cell in book.cells:
        if cell.cell_type == "code":
            kept = [one for one in cell.outputs if one.get("name") != "stderr"]
            printed = "".join(one["text"] for one in kept if one.output_type == "stream")
            kept = [one for one in kept if one.output_type != "stream"]
            if printed:  # it came in pieces, by the clock
                kept.insert(0, nbformat.v4.new_output("stream", name="stdout", text=printed))
            outputs.append(kept)
    return outputs


def write(path: Path, outputs: list[list]) -> None:
    """Write a lesson's notebooks with these outputs."""
    for language, folder in LANGUAGES.items():
        book = notebook(path, language)
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        for count, (cell, found) in enumerate(zip(code, outputs, strict=True), start=1):
            cell.outputs = found
            cell.execution_count = count
        nbformat.write(book, folder / path.with_suffix(".ipynb").name)


def main() -> None:
    """Command line."""
    wanted = [int(word) for word in sys.argv[1:]]
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    for path in sorted(FOLDER.glob("lessons/*.py")):
        if wanted and number_of(path) not in wanted:
            continue
        start = time.monotonic()
        write(path, run(notebook(path, "en")))
        print(f"lesson {path.stem} seconds {time.monotonic() - start:.0f}", flush=True)


if __name__ == "__main__":
    main()
