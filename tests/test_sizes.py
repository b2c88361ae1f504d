"""How much there is to read: bounded, and printed by `pytest tests/test_sizes.py -s`."""

import ast
import runpy
from pathlib import Path

from conftest import ROOT

COUNT = runpy.run_path(str(ROOT / "docs/count.py"))
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
    training = COUNT["closure"](ROOT, "train_vla.py")
    tokens = {name: COUNT["count_tokens"](paths) for name, paths in (
        ("lesson", [ROOT / name for name in LESSON]), ("training", training), ("all", files))}
    longest = {name: count for path in files for name, count in functions(path).items() if count > 40}
    print(f"\nlesson {sum(lesson.values())} {lesson}\ntokens {tokens}\n"
          f"functions above 40 lines {longest}")
    assert sum(lesson.values()) <= 960
    assert tokens["lesson"] <= 7500 and tokens["training"] <= 41_700 and tokens["all"] <= 105_300
    assert {path.name: lines(path) for path in files if lines(path) > 475} == {}
    assert {name for name, count in longest.items() if count > 55} <= {"train_vla.py:train"}
    assert longest.get("train_vla.py:train", 0) <= 66


def test_the_lesson_knows_nothing_of_deepspeeds_insides():
    """But for the verbs that `train` uses."""
    rooms = {"machinery/zero.py", "machinery/checkpoint.py", "machinery/weights.py"}
    for name in LESSON[:-1]:
        assert not imports(ROOT / name) & rooms, name
    tree = ast.parse((ROOT / "train_vla.py").read_text())
    verbs = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and f"{node.module}.py".replace(".", "/", 1) in rooms for alias in node.names}
    assert verbs <= {"load_checkpoint", "Weights", "fill", "parameters_without_memory"}
    verbs = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == "zero"}
    assert verbs == {"build_sharded", "check_json", "correct_engine", "gather_per_block",
                     "parameter_groups", "set_learning_rate", "set_tensors", "with_yaml_values"}
