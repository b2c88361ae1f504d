"""Check an exercise of the course:

    python course/check.py 3          # course/my/exercise_3.py; the first time, it makes that file
    python course/check.py 3 --zh     # in Chinese

Your function takes the place of the project's own for a moment, and both are given the same inputs
(the "probes" of cases/case_3.py). If an answer differs, the check looks for a typical mistake that
gives exactly your answer, and names it. Otherwise it prints the first value that differs. Nothing in
the project's own files changes.
"""

import argparse
import functools
import importlib.util
import inspect
import os
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np

LIMIT = 60  # seconds for a probe
WORDS = {
    "en": {"right": "right: {name} does what the project's own does",
           "made": "exercise {number} write the function in {path}, then run this command again",
           "empty": "the body of {name} in {path} is still to be written",
           "broken": "line {line}: {error}", "mistake": "{what}",
           "endless": "line {line}: no answer after {limit} seconds: does a loop never end?",
           "unseeded": "two calls with the same arguments give different results: the result must depend on "
                       "the arguments and the seed alone",
           "differs": "{probe}: {where}expected {want}, got {got}"},
    "zh": {"right": "正确：{name} 和项目自己的函数结果一致",
           "made": "exercise {number} 请在 {path} 里写出函数体，然后再运行这条命令",
           "empty": "{path} 里 {name} 的函数体还没有写",
           "broken": "第 {line} 行：{error}", "mistake": "{what}",
           "endless": "第 {line} 行：{limit} 秒还没有结果：是不是有循环停不下来？",
           "unseeded": "同样的参数调用两次，结果不同：结果只能由参数和种子决定",
           "differs": "{probe}：{where}应为 {want}，得到 {got}"},
}


# ---- An exercise ---------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    """Run a Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_case(number: int) -> ModuleType:
    """cases/case_N.py: OWNER and NAME (the function's place), probes(), and MISTAKES. A probe is
    (its name in English, in Chinese, a function)."""
    return load(FOLDER / f"cases/case_{number}.py")


def original(case: ModuleType) -> Callable:
    """The project's own function."""
    return getattr(case.OWNER, case.NAME)


def answer(case: ModuleType) -> str:
    """Its source."""
    return textwrap.dedent(inspect.getsource(original(case)))


def file_of(case: ModuleType) -> str:
    """The file that contains it, relative to the project's folder."""
    path = Path(inspect.getsourcefile(original(case)))
    return path.relative_to(FOLDER.parent).as_posix()


def with_mistake(case: ModuleType, old: str, new: str) -> Callable:
    """The project's function with one change to its source."""
    source = answer(case)
    if old not in source:
        raise ValueError(f"{case.NAME} no longer contains {old!r}: adapt {case.__file__}")
    names = dict(original(case).__globals__)
    exec(source.replace(old, new, 1), names)
    return names[case.NAME]


# ---- What a function answers ---------------------------------------------------------------------


def answers(case: ModuleType, function: Callable, which: slice = slice(None)) -> list:
    """The results of the probes if `function` takes the place of the project's own: an array each,
    or the exception that it raised."""
    own = original(case)
    setattr(case.OWNER, case.NAME, function)
    found = []
    try:
        for _, _, probe in case.probes()[which]:
            try:
                found.append(np.asarray(within_limit(probe)))
            except Exception as error:  # a student's code may raise anything
                found.append(error)
    finally:
        setattr(case.OWNER, case.NAME, own)
    return found


@functools.cache
def right_answers(case: ModuleType) -> list:
    """`answers` of the project's function."""
    return answers(case, original(case))


@functools.cache
def mistaken_answers(case: ModuleType, old: str, new: str) -> list:
    """`answers` of the project's function with one change to its source."""
    return answers(case, with_mistake(case, old, new))


class Endless(BaseException):
    """A probe took too long. No Exception, so that no probe after it is tried."""


def within_limit(probe: Callable):
    """A probe's result. Raises Endless after LIMIT seconds."""

    def stop(*_) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        return probe()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def same(first, second) -> bool:
    """Are two answers equal, but for rounding? An id that is a float is no id."""
    if isinstance(first, Exception) or isinstance(second, Exception):
        return type(first) is type(second)
    if first.shape != second.shape or (first.dtype.kind == "f") != (second.dtype.kind == "f"):
        return False
    if first.dtype.kind != "f":
        return first.tolist() == second.tolist()
    return np.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)


def verdict(case: ModuleType, function: Callable, language: str) -> tuple[str, dict]:
    """-> (a key of WORDS, the values for it)."""
    want = right_answers(case)
    got = answers(case, function)
    wrong = [i for i in range(len(want)) if not same(want[i], got[i])]
    if not wrong:
        return "right", {"name": case.NAME}
    first = wrong[0]
    if isinstance(got[first], NotImplementedError) and not str(got[first]):  # PyTorch's has a text
        return "empty", {"name": case.NAME}
    (again,) = answers(case, function, slice(first, first + 1))
    if not same(got[first], again):
        return "unseeded", {}
    mistake = name_mistake(case, want, got, first)
    if mistake:
        return "mistake", {"what": mistake[language]}
    if isinstance(got[first], Exception) and not isinstance(want[first], Exception):
        return "broken", {"line": line_of(got[first], function),
                          "error": f"{type(got[first]).__name__}: {got[first]}"}
    english, chinese, _ = case.probes()[first]
    probe = {"en": english, "zh": chinese}[language]
    return "differs", {"probe": probe, **difference(want[first], got[first])}


def name_mistake(case: ModuleType, want: list, got: list, first: int) -> dict | None:
    """The typical mistake that explains the first wrong answer, in both languages, or None.

    A mistake is (test, English, Chinese) or (old, new, English, Chinese). A test gets all answers
    that are not exceptions, by the probes' English names, and as "first" the first wrong one's name.
    Else the project's function is run with
    `old` replaced by `new`; of several that explain it, the one that agrees in most probes counts.
    """
    by_name = {}
    for (name, _, _), value in zip(case.probes(), got, strict=True):
        if not isinstance(value, Exception):
            by_name[name] = value
    by_name["first"] = case.probes()[first][0]
    found, most = None, 0
    for *change, english, chinese in case.MISTAKES:
        if callable(change[0]):
            try:
                agreeing = len(got) + 1 if change[0](by_name) else 0
            except (KeyError, ValueError, IndexError, TypeError):  # an answer is missing, or no such array
                agreeing = 0
        else:
            theirs = mistaken_answers(case, *change)
            explains = same(theirs[first], got[first]) and not same(theirs[first], want[first])
            agreeing = sum(map(same, theirs, got)) if explains else 0
            raised = isinstance(got[first], Exception) and not isinstance(want[first], Exception)
            if raised and agreeing < len(got):  # an error's type alone explains nothing
                agreeing = 0
        if agreeing > most:
            found, most = {"en": english, "zh": chinese}, agreeing
    return found


def line_of(error: BaseException, function: Callable) -> int:
    """The line of the student's file where an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == function.__code__.co_filename]
    return own[-1] if own else function.__code__.co_firstlineno


def difference(want, got) -> dict:
    """The first place at which two answers differ."""
    if isinstance(want, Exception) or isinstance(got, Exception):
        name = [type(one).__name__ if isinstance(one, Exception) else "no error" for one in (want, got)]
        return {"where": "", "want": name[0], "got": name[1]}
    if want.shape != got.shape or want.ndim == 0:
        inner = want.shape != got.shape
        return {"where": "shape " if inner else "", "want": want.shape if inner else want,
                "got": got.shape if inner else got}
    if (want.dtype.kind == "f") != (got.dtype.kind == "f"):
        return {"where": "", "want": want.dtype, "got": got.dtype}
    equal = np.isclose(want, got, rtol=1e-4, atol=1e-5) if want.dtype.kind == "f" else want == got
    place = tuple(int(i) for i in np.argwhere(~equal)[0])
    return {"where": f"{list(place)} ", "want": want[place], "got": got[place]}


# ---- Command line --------------------------------------------------------------------------------


def check(number: int, path: Path, language: str) -> tuple[bool, str]:
    """Check a student's file -> (is it right?, one line)."""
    case = load_case(number)
    shown = os.path.relpath(path, FOLDER.parent)
    try:
        function = getattr(load(path), case.NAME)
    except SyntaxError as error:
        key, values = "broken", {"line": error.lineno, "error": f"SyntaxError: {error.msg}"}
    except Exception as error:  # from a line outside of the function, or there is no such function
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        key, values = "broken", {"line": lines[-1] if lines else 1, "error": f"{type(error).__name__}: {error}"}
    else:
        try:
            key, values = verdict(case, function, language)
        except Endless as error:
            key, values = "endless", {"line": line_of(error, function), "limit": LIMIT}
    line = WORDS[language][key].format(path=shown, **values)
    return key == "right", f"exercise {number} {line}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int, choices=range(1, 9), help="of the exercise")
    parser.add_argument("--zh", action="store_true", help="in Chinese")
    args = parser.parse_args()
    language = "zh" if args.zh else "en"
    os.chdir(FOLDER.parent)  # the configs name their files from here
    path = FOLDER / f"my/exercise_{args.number}.py"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / f"exercises/exercise_{args.number}.py", path)
        print(WORDS[language]["made"].format(number=args.number, path=os.path.relpath(path)))
        sys.exit(1)
    right, line = check(args.number, path, language)
    print(line)
    sys.exit(not right)


if __name__ == "__main__":
    main()
