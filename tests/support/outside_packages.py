"""Packages with entry points, installed into a folder as pip does it, without a network."""

from __future__ import annotations

import shutil
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_scorer"
GROUP = "vllm_kvcompress.scorers"


def install(
    folder: Path, name: str, scorers: Mapping[str, str], module: str = "", version: str = "1.0"
) -> None:
    """Install a package of one module into a folder for `sys.path`.

    Args:
        folder: exists.
        name: of the package; its module is the same with underscores.
        scorers: entry points of the group of scorers, name: "module:Class".
        module: its source.
        version: of the package.
    """
    _write_info(folder, name, version, {GROUP: scorers})
    (folder / f"{name.replace('-', '_')}.py").write_text(textwrap.dedent(module))


def install_example(folder: Path) -> None:
    """Install examples/own_scorer as its pyproject.toml says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    about = project["project"]
    _write_info(folder, about["name"], about["version"], about["entry-points"])
    for module in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(EXAMPLE / f"{module}.py", folder)


def _write_info(
    folder: Path, name: str, version: str, entry_points: Mapping[str, Mapping[str, str]]
) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
