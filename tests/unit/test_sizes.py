"""No function and no file is longer than a reader takes in at once, unless it says why.

A Python function may have 80 lines and a source file 500. A longer one needs a reason in a comment:
`# One function: <reason>` right above the function, or `# One file: <reason>` (`//` in C++) before
the file's first import. A function's docstring does not count: it is there to be read, and a limit
on it would only make it say less. A file's lines all count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
CPP_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}
# Where a file's first statement is; what stands above is its head.
FIRST_STATEMENT = re.compile(r"^(import |from |def |class |@|#include |namespace )", re.MULTILINE)


def sources() -> list[Path]:
    """Python and C++ files of the repository, but nothing that was built or installed."""
    folders = [
        folder
        for folder in REPOSITORY.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and folder.suffix != ".egg-info"
        and folder.name not in ("build", "dist")
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path for path in (*files, *REPOSITORY.glob("*.py")) if path.suffix in {".py", *CPP_SUFFIXES}
    )


def reason_above(lines: list[str], number: int) -> bool:
    """Whether the comment right above line `number`, from 1, gives a function's reason."""
    above = []
    for line in reversed(lines[: number - 1]):
        if not line.lstrip().startswith("#"):
            break
        above.append(line.strip())
    return any(re.match(r"# One function: \w", line) for line in above)


def long_functions(text: str) -> Iterator[str]:
    """Functions of a Python source that are too long and give no reason."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            num_lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        if num_lines > MAX_FUNCTION_LINES and not reason_above(lines, first):
            yield f"{node.name} has {num_lines} lines"


def too_long(text: str, suffix: str) -> list[str]:
    """What is too long in a source and gives no reason."""
    found = []
    num_lines = len(text.splitlines())
    statement = FIRST_STATEMENT.search(text)
    head = text[: statement.start()] if statement else text
    has_reason = re.search(r"^(#|//) One file: \w", head, re.MULTILINE)
    if num_lines > MAX_FILE_LINES and not has_reason:
        found.append(f"the file has {num_lines} lines")
    if suffix == ".py":
        found += long_functions(text)
    return found


def test_no_function_and_no_file_is_too_long():
    found = {
        str(path.relative_to(REPOSITORY)): too_long(path.read_text(encoding="utf-8"), path.suffix)
        for path in sources()
    }
    assert {path: what for path, what in found.items() if what} == {}


def test_the_walk_finds_every_kind_of_source():
    found = {str(path.relative_to(REPOSITORY)) for path in sources()}
    assert {
        "setup.py",
        "csrc/cuda/select.cu",
        "csrc/cuda/copy.cuh",
        "csrc/row_fields.h",
        "tests/support/csrc/schedule.cpp",
        "triton_kernels/paging.py",
        "vllm_kvcompress/config.py",
    } <= found
    assert not any(path.startswith((".venv", "build")) for path in found)


def function(num_lines: int, above: str = "", docstring: str = "") -> str:
    """A made-up method of so many lines, and of a docstring's."""
    body = [docstring] if docstring else []
    body += ["x = 1"] * (num_lines - 1)
    lines = [above, "@decorator", "def work(self):", *(f"    {line}" for line in body)]
    return "class Machine:\n" + "".join(f"    {line}\n" for line in lines if line)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (function(80), []),
        (function(81), ["work has 81 lines"]),
        (function(80, docstring='"""One line."""'), []),
        (function(81, docstring='"""One line."""'), ["work has 81 lines"]),
        (function(80).replace("def ", "async def "), []),
        (function(81).replace("def ", "async def "), ["work has 81 lines"]),
        (function(81, above="# One function: its steps share a loop."), []),
        (function(81, above="# One function:"), ["work has 81 lines"]),
        (function(81, above="# Some other comment."), ["work has 81 lines"]),
        # A reason is for one function, and not for what comes behind it.
        ("# One function: it is first.\nx = 1\n" + function(81), ["work has 81 lines"]),
    ],
)
def test_a_long_function_is_found(text, found):
    assert too_long(text, ".py") == found


@pytest.mark.parametrize(
    ("first", "others", "suffix", "found"),
    [
        ("", "x = 1\n" * 500, ".py", []),
        ("", "x = 1\n" * 501, ".py", ["the file has 501 lines"]),
        ("", "int x;\n" * 501, ".cu", ["the file has 501 lines"]),
        ("# One file: a table.\nimport math\n", "x = 1\n" * 500, ".py", []),
        ("// One file: a table.\n#include <x>\n", "int x;\n" * 500, ".cu", []),
        # Too late to be seen by who opens the file.
        ("import math\n# One file: a table.\n", "x = 1\n" * 500, ".py", ["the file has 502 lines"]),
    ],
)
def test_a_long_file_is_found(first, others, suffix, found):
    assert too_long(first + others, suffix) == found
