"""Write the lengths of the files into the documentation, or count what a program of a repository imports.

    python docs/count.py
    python docs/count.py . train_vla.py
    python docs/count.py ../openvla vla-scripts/train.py
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSON = ["action_tokenizer.py", "model.py", "data.py", "train_vla.py"]  # to be read in this order
ROW = re.compile(r"^(\| `(\w+\.py)` \|) [\d,]+ \|", re.MULTILINE)


def lines(names: Iterable[str | Path]) -> int:
    return sum((ROOT / name).read_text().count("\n") for name in names)


def needed_to_train() -> list[str]:
    """The files of the first table of docs/files.md."""
    return [name for _, name in ROW.findall((ROOT / "docs/files.md").read_text().split("## Not needed")[0])]


def counted(text: str) -> str:
    """A page with all its lengths put right: rows of tables, the lesson's, and those of a training run."""
    text = ROW.sub(lambda match: f"{match[1]} {lines([match[2]])} |", text)
    text = re.sub(r"\*\*[\d,]+( lines| 行)\*\*", lambda match: f"**{lines(LESSON):,}{match[1]}**", text)
    core = needed_to_train()
    return re.sub(r"\d+( files, | 个文件[,\uff0c] ?)[\d,]+( lines| 行)( \|)$",
                  lambda match: f"{len(core)}{match[1]}{lines(core):,}{match[2]}{match[3]}", text, flags=re.M)


def imported(file: Path, root: Path) -> Iterator[Path]:
    """The repository's files that stand in any import of a file; a package's `__init__.py` is one."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.ImportFrom):
            package = file.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{name}" for name in names)]
        elif not isinstance(node, ast.Import):
            continue
        for parts in (name.split(".") for name in names):
            stems = [root.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
            found = [stem / "__init__.py" for stem in stems] + [stems[-1].with_suffix(".py")]
            yield from filter(Path.is_file, found)


def closure(root: Path, start: str) -> set[Path]:
    """All files that a program needs of its own repository."""
    found, todo = set(), [root / start]
    while todo:
        if (file := todo.pop()) not in found:
            found.add(file)
            todo += imported(file, root)
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        needed = closure(Path(sys.argv[1]).resolve(), sys.argv[2])
        print(f"{len(needed)} files, {lines(needed):,} lines")
    else:
        for page in ("README.md", "README.zh.md", "docs/files.md"):
            (ROOT / page).write_text(counted((ROOT / page).read_text()))
