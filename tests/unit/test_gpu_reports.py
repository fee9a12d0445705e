"""What results say of themselves: where they were measured, and which tests failed."""

from __future__ import annotations

import re

import machine
import pytest
from gpu.test_report import report


def test_the_commit_is_gits_or_as_told(monkeypatch, tmp_path):
    monkeypatch.delenv("KVC_COMMIT", raising=False)
    if machine.said_by("git", "status") is not None:
        assert re.fullmatch(r"[0-9a-f]{40}", machine.commit())
    # A copy without git, on a machine without it.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() is None
    monkeypatch.setenv("KVC_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_a_program_that_fails_says_nothing():
    assert machine.said_by("false") is None
    assert machine.said_by("echo", "a b") == "a b"


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_report_counts_tests_and_names_the_failed(monkeypatch, tmp_path, is_passed):
    monkeypatch.setattr(machine, "device", lambda: {"device": "a GPU", "driver": "580"})
    cases = ['<testcase classname="tests.a" name="fine" />']
    if not is_passed:
        cases += [
            '<testcase classname="tests.a" name="wrong"><failure message="m" /></testcase>',
            '<testcase classname="tests.b" name="broken"><error message="m" /></testcase>',
        ]
    counts = f'tests="{len(cases)}" failures="{not is_passed:d}" errors="{not is_passed:d}"'
    xml = tmp_path / "junit.xml"
    xml.write_text(
        f'<testsuites><testsuite name="pytest" {counts} skipped="0" time="1.5">'
        f"{''.join(cases)}</testsuite></testsuites>"
    )
    found = report(xml, 0 if is_passed else 1)
    assert found["exit_status"] == int(not is_passed)
    assert (found["device"], found["driver"], found["seconds"]) == ("a GPU", "580", 1.5)
    assert found["tests"] == len(cases)
    assert found["failed"] == ([] if is_passed else ["tests.a::wrong", "tests.b::broken"])
