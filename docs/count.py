"""Write the lengths of the files into the documentation: python docs/count.py"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSON = ["action_tokenizer.py", "model.py", "data.py", "train_vla.py"]  # to be read in this order
ROW = re.compile(r"^(\| `(\w+\.py)` \|) [\d,]+ \|", re.MULTILINE)


def lines(names: list[str]) -> int:
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


if __name__ == "__main__":
    for page in ("README.md", "README.zh.md", "docs/files.md"):
        (ROOT / page).write_text(counted((ROOT / page).read_text()))
