"""The prose of code and documentation keeps clear of a few habits that make English hard to read.

Occurrences per 1,000 words of docstrings and comments, and of README.md and docs. Everything "says" and "stands",
clauses begin with "what" in place of a noun, "is no X" replaces "is not an X". For comparison: nanochat has 0.2
of say and tell, 0 of stand and lie, 0.6 of "what" as a noun.
"""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

MOST = {  # per 1,000 words
    r"say|says|said|saying|tell|tells|told": 0.5,
    r"stand|stands|stood|lie|lies|lay": 0.5,
    r"(?:is|are|be|was|were) no (?!longer|more|less)\w+": 0.3,
    r"what (?:is|are|was|it|they|a|an|the|has|have|comes|goes|cannot|would|no|one)": 1.0,
    r"nobody|alone|whole": 0.5,
    r"mend\w*": 0,
}


def prose_of_code() -> str:
    """All docstrings and comments of the root and of machinery."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("machinery/*.py")]:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                found.append(token.string.lstrip("# "))
    return "\n".join(found)


def prose_of_docs() -> str:
    """The English pages without code and addresses."""
    pages = [ROOT / "README.md", ROOT / "ds_configs/README.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text() for page in pages if not page.name.endswith(".zh.md"))
    return re.sub(r"```.*?```|`[^`]*`|https?://\S+", " ", text, flags=re.DOTALL)


@pytest.mark.parametrize("prose", [prose_of_code, prose_of_docs])
def test_habits_are_rare(prose):
    text = prose()
    words = len(re.findall(r"[A-Za-z']+", text))
    assert words > 5000
    too_often = {}
    for habit, most in MOST.items():
        found = re.findall(rf"\b(?:{habit})\b", text, re.IGNORECASE)
        frequency = 1000 * len(found) / words
        if frequency > most:
            too_often[habit] = f"{frequency:.2f} instead of {most}: {found[:5]}"
    assert not too_often
