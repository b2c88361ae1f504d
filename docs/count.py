"""Write the files' sizes into the documentation, or count a program and the files it imports.

    python docs/count.py
    python docs/count.py . train_vla.py
    python docs/count.py ../openvla vla-scripts/train.py

Lines flatter dense code, so tokens are counted too: Python's own, without docstrings and comments.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh.md", "docs/files.md")
LESSON = ["action_tokenizer.py", "model.py", "data.py", "train_vla.py"]  # in reading order
ROW = re.compile(r"^(\| `((?:machinery/)?\w+\.py)` \|) [\d,]+ \|", re.MULTILINE)
COUNTED = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_lines(files: Iterable[Path]) -> int:
    return sum(file.read_text().count("\n") for file in files)


def count_tokens(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        source = file.read_text()
        docstring_lines = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, HAS_DOCSTRING) and ast.get_docstring(node) is not None:
                docstring_lines |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            total += token.type in COUNTED and token.start[0] not in docstring_lines
    return total


def imported(file: Path, root: Path) -> Iterator[Path]:
    """The repository's files named by any import statement in a file, and their `__init__.py`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            stem = root.joinpath(*name.split("."))
            packages = [stem, *stem.parents][: len(name.split("."))]
            candidates = [stem.with_suffix(".py"), *(folder / "__init__.py" for folder in packages)]
            yield from filter(Path.is_file, candidates)


def closure(root: Path, start: str) -> set[Path]:
    """All files of its own repository that a program imports, directly or indirectly."""
    found = set()
    todo = [root / start]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imported(file, root)
    return found


def update(page: str) -> str:
    """A page with its sizes updated: table rows, the lesson's, and a training run's."""
    page = ROW.sub(lambda row: f"{row[1]} {count_lines([ROOT / row[2]])} |", page)
    lesson = count_lines(ROOT / name for name in LESSON)
    page = re.sub(r"\*\*[\d,]+( lines| 行)\*\*", lambda match: f"**{lesson:,}{match[1]}**", page)
    files = closure(ROOT, "train_vla.py")
    sizes = (len(files), count_lines(files), count_tokens(files))
    training = re.compile(r"\d+( files, | 个文件\W)[\d,]+( lines, | 行\W)[\d,]+( tokens| 个 token)(?= \|$)",
                          re.MULTILINE)
    return training.sub(lambda found: "".join(f"{size:,}{unit}" for size, unit
                                              in zip(sizes, found.groups(), strict=True)), page)


if __name__ == "__main__":
    if sys.argv[1:]:
        needed = closure(Path(sys.argv[1]).resolve(), sys.argv[2])
        print(f"{len(needed)} files, {count_lines(needed):,} lines, {count_tokens(needed):,} tokens")
    else:
        for name in PAGES:
            (ROOT / name).write_text(update((ROOT / name).read_text()))
