"""A small model's config and runs of the command, for the tests of `vllm-kvcompress`."""

from __future__ import annotations

import json

from vllm_kvcompress.cli import main

# 4 layers x 2 KV heads x 8 numbers x 2 bytes, keys and values: 256 bytes per token.
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "dtype": "bfloat16",
}
FULL, WINDOWED = "full_attention", "sliding_attention"
# Gemma 3's way: two layers with full attention, four with a window, in two groups of two.
MIXED = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "layer_types": [WINDOWED, WINDOWED, FULL] * 2,
    "sliding_window": 40,
}
BLOCK_BYTES = 16 * 256
OPTIONS = "--kv-compress-options"
# Of 500 tokens the last 32 are the window, so 468 // 16 = 29 pages compete and 36 tokens stay
# dense; (128 - 36) // 16 = 5 pages per head are left of the budget.
SETTING = ("--kv-compress-budget", "128", "--prompt-len", "500", "--output-len", "100")


def published_pages(*flags):
    """Flags for a window of 32 and whole pages, in the published form; options among them stay."""
    flags = list(flags)
    options = {"published": True, "granularity": "page"}
    if OPTIONS in flags:
        at = flags.index(OPTIONS)
        options.update(json.loads(flags[at + 1]))
        del flags[at : at + 2]
    return (*flags, OPTIONS, json.dumps(options))


def write_model(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plan_json(capsys, model, method, *flags):
    """Numbers of these tests are those of the published forms, in whole pages."""
    flags = published_pages(*flags)
    assert main(["plan", model, "--kv-compress", method, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def plan_one(capsys, model, method, *flags):
    (request,) = plan_json(capsys, model, method, *flags)["requests"]
    return request


def one_line_error(capsys, *arguments):
    """What a refused command prints; it must be one line on stderr, with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err
