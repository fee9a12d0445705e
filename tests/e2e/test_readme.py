"""The README's server, client and offline script, run as they are written.

Put in: the model's folder, a free port, a smaller pool, and a document for "A long document ...".
The server does not compile the model, the script does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from readme import blocks, commands
from server_process import serving

README = (Path(__file__).parents[2] / "README.md").read_text()
DOCUMENT = "A long document ..."


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(device):
    """The README's commands are for one; the pool's size is in them."""
    if device != "cpu":
        pytest.skip("the README's commands are written for a CPU")


@pytest.fixture(scope="module")
def port(model, device, tmp_path_factory):
    """Port of a server started by the README's first command."""
    command = next(words for words in commands(README) if words[:2] == ["vllm", "serve"])
    put_in = {"MODEL": model, "4G": "256M"}
    assert set(put_in) <= set(command)
    arguments = [put_in.get(word, word) for word in command[2:]]
    arguments += ["--served-model-name", "MODEL", "--enforce-eager"]
    with serving(arguments, tmp_path_factory.mktemp("readme")) as server:
        yield server.port
        assert "kv-compress: span, ratio 0.875" in server.output()


def run(command: list[str]) -> str:
    """What a command that ends well prints."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def test_curl_gets_an_answer(port):
    (block,) = [block for block in blocks(README, "bash") if block.startswith("curl ")]
    assert "localhost:8000" in block
    answer = json.loads(run(["bash", "-c", block.replace("localhost:8000", f"127.0.0.1:{port}")]))
    assert answer["choices"][0]["message"]["content"]


def test_the_openai_client_gets_an_answer(port):
    (block,) = [block for block in blocks(README, "python") if "OpenAI(" in block]
    assert "localhost:8000" in block
    text = run([sys.executable, "-c", block.replace("localhost:8000", f"127.0.0.1:{port}")])
    assert text.strip()


def test_the_offline_script_counts_what_it_removes(model, needle, tmp_path):
    (block,) = [block for block in blocks(README, "python") if "LLM(" in block]
    chat, _ = needle(7)
    for old, new in (
        ('"MODEL"', repr(model)),
        ("4 << 30", "256 << 20"),
        (f'"{DOCUMENT}"', repr(chat[0]["content"])),
    ):
        assert block.count(old) == 1
        block = block.replace(old, new)
    # From a file: vLLM's process reads the script again.
    script = tmp_path / "offline.py"
    script.write_text(block)
    output = run([sys.executable, "-P", str(script)])
    ((kept, returned),) = re.findall(r"^([\d.]+) (\d+)$", output, re.M)
    assert 150 < float(kept) < 260 and int(returned) > 30
