"""The names of vLLM that we rely on, in the vLLM installed here and in one that needs a GPU."""

from __future__ import annotations

import copy
import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
from vllm_contract import CONTRACT, contract_problems, defined_names, find_names, record

RECORDS = sorted((Path(__file__).parents[1] / "data").glob("vllm-*.json"))
MANAGER = "v1/core/single_type_kv_cache_manager.py"


@pytest.fixture(scope="module")
def installed():
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "these tests need vLLM's sources"
    return find_names(Path(spec.submodule_search_locations[0]))


def test_installed_vllm_holds_the_contract(installed):
    assert contract_problems(installed) == []


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_recorded_vllm_holds_the_contract(path):
    recorded = json.loads(path.read_text())
    assert recorded["vllm"].startswith(path.stem) and len(recorded["sha256"]) == 64
    assert contract_problems(recorded["names"]) == []


def test_there_is_a_record_of_every_other_supported_minor_version():
    from vllm_kvcompress.vllm_integration.compat import SUPPORTED_VLLM

    versions = [path.stem.removeprefix("vllm-") for path in RECORDS]
    assert versions and all(SUPPORTED_VLLM.contains(version) for version in versions)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        (
            "SingleTypeKVCacheManager.pop_blocks_for_free",
            ["self", "request_id", "now"],
            "pop_blocks_for_free takes (self, request_id, now), not (self, request_id)",
        ),
        ("SingleTypeKVCacheManager.req_to_blocks", "gone", "req_to_blocks is gone"),
        ("SingleTypeKVCacheManager.allocate_new_blocks", None, "is no function any more"),
    ],
)
def test_changes_are_noticed(installed, name, found, message):
    changed = copy.deepcopy(installed)
    if found == "gone":
        del changed[MANAGER][name]
    else:
        changed[MANAGER][name] = found
    (problem,) = contract_problems(changed)
    assert problem.startswith(MANAGER) and message in problem


def test_called_functions_may_take_more_but_not_less(installed):
    changed = copy.deepcopy(installed)
    parameters = changed["_custom_ops.py"]["cpu_attn_reshape_and_cache"]
    parameters.append("something_new")
    assert contract_problems(changed) == []
    parameters.remove("isa")
    assert contract_problems(changed) == [
        "_custom_ops.py: cpu_attn_reshape_and_cache no longer takes isa"
    ]


def test_names_of_a_source():
    source = """
if True:
    def f(a, /, b, *rest, c=1, **more): ...
@functools.cache
def g(): ...
class C(Base):
    size: int = 3
    LIMIT = 4
    @property
    def half(self): ...
    def __init__(self, n):
        self.n = n
        other.m = n
"""
    assert defined_names(source) == {
        "f": ["a", "b", "c", "*rest", "*more"],
        "g": [],
        "C": None,
        "C.size": None,
        "C.LIMIT": None,
        "C.half": None,
        "C.__init__": ["self", "n"],
        "C.n": None,
    }


def test_wheels_are_read_without_unpacking(tmp_path):
    wheel = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/logger.py", "def init_logger(name): ...\nx = 1\n")
    assert find_names(wheel) == {"logger.py": {"init_logger": ["name"], "x": None}}
    problems = contract_problems(find_names(wheel))
    assert problems == [f"{file} is gone" for file in CONTRACT if file != "logger.py"]
    recorded = record(wheel)
    assert recorded["vllm"] == wheel.name and len(recorded["sha256"]) == 64
    assert recorded["names"] == {"logger.py": {"init_logger": ["name"]}}
