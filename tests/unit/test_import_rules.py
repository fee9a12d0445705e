"""Who may import whom, read from the sources: a list of all that is allowed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "vllm_kvcompress"
KERNELS = REPOSITORY / "triton_kernels"
MAX_LINES = 600

# The three ways in which a module imports another.
AT_IMPORT = "when it is imported itself"
DEFERRED = "inside a function"
TYPING = "for type checkers only"

# Every folder and every module at the top of the package, and the others that it imports when it
# is imported. A part that is not in this list fails, and so does an arrow that is no longer there.
ALLOWED = {
    "__init__": {"config"},
    "cli": {"config", "flags", "memory", "model_layers", "policies"},
    "compaction": {"config", "memory", "ops", "policies"},
    "config": {"memory", "policies"},
    "flags": {"config", "policies"},
    "memory": {"row_descriptor"},
    "model_layers": {"config"},
    "ops": {"row_descriptor"},
    "policies": {"ops"},
    "row_descriptor": set(),
    "triton_kernels": set(),
    "vllm_integration": {
        "compaction",
        "config",
        "flags",
        "memory",
        "model_layers",
        "ops",
        "policies",
    },
}
# Beside these: what is imported inside a function, or for type checkers only.
ALLOWED_LATER = {
    # vLLM is imported when somebody asks for `LLM`.
    ("__init__", "vllm_integration"),
    # Triton is imported when one of its kernels runs.
    ("ops", "triton_kernels"),
}

# Runs in vLLM's scheduler, where nothing of ours may need torch. vLLM brings torch itself.
SCHEDULER_SIDE = ("memory", "vllm_integration.scheduler")


def imports_in(source: str, package: str = "") -> Iterator[tuple[str, str, str]]:
    """(module, name in it or "", way) of all imports of a source that lies in `package`."""

    def visit(node: ast.AST, way: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            inner = way
            match child:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    inner = DEFERRED
                case ast.If(test=ast.Name("TYPE_CHECKING")):
                    inner = TYPING
                case ast.Import(names=names):
                    yield from ((alias.name, "", way) for alias in names)
                case ast.ImportFrom(module=module, names=names, level=level):
                    parts = package.split(".")[: -(level - 1) or None] if level else []
                    base = ".".join([*parts, *([module] if module else [])])
                    yield from ((base, alias.name, way) for alias in names)
                case ast.Call(
                    func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
                ):
                    yield name, "", way
            yield from visit(child, inner)

    return visit(ast.parse(source), AT_IMPORT)


def find_modules() -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself is '__init__'."""
    found = {}
    for root, prefix in ((PACKAGE, ()), (KERNELS, ("triton_kernels",))):
        for path in sorted(root.rglob("*.py")):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = find_modules()
ROOT = "vllm_kvcompress"


def imports_of(module: str) -> set[tuple[str, str]]:
    """(absolute dotted name, way) of what a module of ours imports; ours without its root."""
    path = MODULES[module]
    own = [ROOT, *([] if module == "__init__" else module.split("."))]
    package = own if path.name == "__init__.py" else own[:-1]
    found = set()
    for base, name, way in imports_in(path.read_text(encoding="utf-8"), ".".join(package)):
        if base.split(".")[0] != ROOT:
            found.add((f"/{base}", way))
            continue
        inner = base.partition(".")[2]
        # A name may be a module of its own.
        full = ".".join(part for part in (inner, name) if part)
        found.add((full if full in MODULES else inner or "__init__", way))
    return found


OURS = {
    module: {(target, way) for target, way in imports_of(module) if not target.startswith("/")}
    for module in MODULES
}
# "/torch.nn" -> "torch".
OTHERS = {
    module: {
        (target[1:].split(".")[0], way)
        for target, way in imports_of(module)
        if target.startswith("/")
    }
    for module in MODULES
}


def part_of(module: str) -> str:
    return module.split(".")[0]


def arrows(*ways: str) -> set[tuple[str, str]]:
    """Between different parts of the package."""
    return {
        (part_of(module), part_of(target))
        for module, targets in OURS.items()
        for target, way in targets
        if way in ways and part_of(module) != part_of(target)
    }


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in turn, or None."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import vllm.config as c", "", ("vllm.config", "", AT_IMPORT)),
        ("def f():\n    from vllm.config import X", "", ("vllm.config", "X", DEFERRED)),
        ("class A:\n    from vllm import envs", "", ("vllm", "envs", AT_IMPORT)),
        ("if TYPE_CHECKING:\n    import a", "", ("a", "", TYPING)),
        ("try:\n    import a\nexcept ImportError:\n    pass", "", ("a", "", AT_IMPORT)),
        ("from . import sibling", "ours.folder", ("ours.folder", "sibling", AT_IMPORT)),
        ("from ..other import x", "ours.folder", ("ours.other", "x", AT_IMPORT)),
        ("f = lambda: importlib.import_module('a.b')", "", ("a.b", "", DEFERRED)),
    ],
)
def test_imports_are_found(source, package, found):
    assert found in set(imports_in(source, package))


def test_every_part_is_listed():
    assert set(ALLOWED) == {part_of(module) for module in MODULES}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_what_is_listed_and_all_of_it(part):
    found = {target for source, target in arrows(AT_IMPORT) if source == part}
    assert found == ALLOWED[part]


def test_what_is_imported_later_is_listed():
    at_import = {(part, target) for part, targets in ALLOWED.items() for target in targets}
    assert arrows(DEFERRED, TYPING) - at_import == ALLOWED_LATER


def test_no_module_imports_itself_in_a_circle():
    edges = {
        module: {target for target, way in targets if way == AT_IMPORT and target != module}
        for module, targets in OURS.items()
    }
    assert circle(edges) is None
    # It would be found.
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_no_circle_is_left_even_of_later_imports():
    # Types alone tie nothing: a policy says that it takes a setting, which names policies.
    edges = {
        module: {target for target, way in targets if way != TYPING and target != module}
        for module, targets in OURS.items()
    }
    assert circle(edges) is None


def test_the_scheduler_needs_no_torch_of_ours():
    reached, left = (
        set(),
        {module for module in MODULES if any(is_within(module, part) for part in SCHEDULER_SIDE)},
    )
    assert left >= set(SCHEDULER_SIDE)
    while left:
        module = left.pop()
        reached.add(module)
        for target, way in OURS[module]:
            if way == AT_IMPORT and target not in reached:
                left.add(target)
    heavy = {
        module
        for module in reached
        if {name for name, way in OTHERS[module] if way == AT_IMPORT} & {"torch", "triton"}
    }
    assert heavy == set()


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_only_the_seam_imports_vllm():
    importers = {module for module in MODULES if "vllm" in {name for name, _ in OTHERS[module]}}
    assert importers
    assert {module for module in importers if part_of(module) != "vllm_integration"} == set()


def test_files_stay_short():
    folders = ("vllm_kvcompress", "triton_kernels", "tests", "scripts", "benchmarks", "examples")
    long_files = {
        str(path.relative_to(REPOSITORY)): num_lines
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long_files == {}


def test_our_kernels_are_not_the_package_that_vllm_probes_for(tmp_path):
    # vLLM takes any importable top-level triton_kernels for OpenAI's and then fails on MXFP4.
    script = (
        "import importlib.util as u, sys\n"
        "assert u.find_spec('vllm_kvcompress') is not None\n"
        "sys.exit(u.find_spec('triton_kernels') is not None)\n"
    )
    command = [sys.executable, "-I", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr or "triton_kernels is importable"
