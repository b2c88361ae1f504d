"""The lesson is read in one evening: how much there is to read, printed (`pytest tests/test_sizes.py -s`) and
bounded."""

import ast
import runpy
from pathlib import Path

from conftest import ROOT

closure = runpy.run_path(str(ROOT / "docs/count.py"))["closure"]
LESSON = ["action_tokenizer.py", "model.py", "data.py", "train_vla.py"]


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def imports(path: Path) -> set[str]:
    """The project's files that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") + ".py" for name in names}
    return {file for file in files if (ROOT / file).exists()}


def functions(path: Path) -> dict[str, int]:
    """{name: lines} of the functions of a file, decorators included."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[f"{path.name}:{node.name}"] = node.end_lineno - first + 1
    return found


def test_how_much_there_is_to_read():
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("machinery/*.py")])
    lesson = {name: lines(ROOT / name) for name in LESSON}
    training = {path.name: lines(path) for path in sorted(closure(ROOT, "train_vla.py"))}
    longest = {name: count for path in files for name, count in functions(path).items() if count > 40}
    print(f"\nlesson {sum(lesson.values())} {lesson}\ntraining {sum(training.values())} {training}\n"
          f"functions above 40 lines {longest}")
    assert sum(lesson.values()) <= 1000
    # 3,400; 320 of LoRA, 8 bits and the memory they take; 310 more of zero_speed.py, which could be left out;
    # 219 that refuse users' mistakes in one line, before the work starts
    assert sum(training.values()) <= 4300
    assert {path.name: lines(path) for path in files if lines(path) > 450} == {}
    assert {name for name, count in longest.items() if count > 50} <= {"train_vla.py:train"}
    assert longest.get("train_vla.py:train", 0) <= 60


def test_the_lesson_knows_nothing_of_deepspeeds_insides():
    """But for the verbs that `train` uses."""
    rooms = {"machinery/zero.py", "machinery/checkpoint.py", "machinery/weights.py"}
    for name in LESSON[:-1]:
        assert not imports(ROOT / name) & rooms, name
    tree = ast.parse((ROOT / "train_vla.py").read_text())
    verbs = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and f"{node.module}.py".replace(".", "/", 1) in rooms for alias in node.names}
    assert verbs <= {"load_checkpoint", "start_from", "Weights", "adapt", "build_sharded", "check_json",
                     "describe_parameters", "gather_per_block", "set_learning_rate",
                     "set_tensors", "describe_base", "fill", "parameters_without_memory"}
