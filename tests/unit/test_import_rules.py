"""The arrows between the folders, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "vllm_kvcompress"
KERNELS = REPOSITORY / "triton_kernels"
MAX_LINES = 600

# Who may not import whom, as (folder or module, forbidden prefixes).
FORBIDDEN = [
    ("policies", ("memory", "compaction", "vllm_integration", "triton_kernels")),
    ("memory", ("policies", "ops", "compaction", "vllm_integration", "triton_kernels")),
    ("ops", ("config", "policies", "memory", "compaction", "vllm_integration")),
    ("cli", ("ops", "compaction", "triton_kernels")),
    ("compaction.py", ("vllm_integration", "triton_kernels")),
    ("config.py", ("ops", "memory", "compaction", "vllm_integration", "triton_kernels")),
]


def imported_modules(source, module=""):
    """Absolute names of all modules (and names in them) that a source imports."""
    package = module.split(".")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level] + base
            start = ".".join(base)
            found |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return found


def imports_of(path):
    # __init__ stays in the name, so that relative imports count levels right.
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return imported_modules(path.read_text(encoding="utf-8"), module)


def is_within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def sources(*parts):
    root = PACKAGE.joinpath(*parts)
    found = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    assert found
    return found


@pytest.mark.parametrize(
    ("source", "module", "name"),
    [
        ("import vllm.config as c", "", "vllm.config"),
        ("def f():\n    from vllm.config import X", "", "vllm.config"),
        ("from vllm import envs", "", "vllm.envs"),
        ("from . import sibling", "ours.folder.module", "ours.folder.sibling"),
        ("from ..other import x", "ours.folder.module", "ours.other"),
        ("from .folder import x", "ours.__init__", "ours.folder"),
    ],
)
def test_imports_are_found(source, module, name):
    assert name in imported_modules(source, module)


def test_only_the_seam_imports_vllm():
    offenders = {
        str(path.relative_to(REPOSITORY))
        for path in sources()
        if any(is_within(name, "vllm") for name in imports_of(path))
    }
    assert offenders
    assert {path for path in offenders if "vllm_integration" not in path} == set()


@pytest.mark.parametrize(("part", "forbidden"), FORBIDDEN, ids=[part for part, _ in FORBIDDEN])
def test_arrows(part, forbidden):
    for path in sources(part):
        for name in imports_of(path):
            for prefix in forbidden:
                assert not is_within(name, f"vllm_kvcompress.{prefix}"), f"{path} imports {name}"


def test_kernels_import_nothing_of_ours():
    for path in sorted(KERNELS.rglob("*.py")):
        ours = {
            name
            for name in imports_of(path)
            if is_within(name, "vllm_kvcompress") or is_within(name, "vllm")
        }
        assert ours == set(), f"{path} imports {ours}"


def test_files_stay_short():
    long_files = {
        str(path.relative_to(REPOSITORY)): num_lines
        for root in (PACKAGE, KERNELS, REPOSITORY / "tests", REPOSITORY / "scripts")
        for path in root.rglob("*.py")
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
