"""Writes kvpress' greedy answers to a few prompts, for the end-to-end parity test.

Runs where kvpress is installed (kvpress_env.sh). Lengths and budgets are whole pages of
`PAGE` tokens beside what the engine always keeps, so that both keep the very same number of
tokens. The file holds "versions", "model" and "cases", each with "press", "window" (queries that
score; also what is always kept), "prompt_len", "kept" (tokens per head, asked), "prompt" (token
ids), "full" (answer of the full cache) and "answer" (token ids, with the one that ended it).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path.insert(0, str(HERE.parent))

from quality import tasks
from quality.kvpress_jobs import Job
from quality.kvpress_runner import Runner, versions

OUTPUT = HERE.parents[1] / "tests" / "data" / "kvpress" / "answers.json"
PAGE = 32
# Press, window, (pages of the prompt before what is always kept, pages kept of them).
CASES = (
    ("snapkv", 32, ((19, 9), (22, 5))),
    ("criticalkv", 32, ((19, 9), (22, 5))),
    ("tova", 1, ((20, 9), (23, 6))),
    ("streamingllm", 1, ((20, 9), (23, 6))),
)
SEEDS = (1, 2)
MAX_NEW_TOKENS = 12


def prompt_of_length(runner: Runner, seed: int, length: int) -> list[int]:
    """Token ids of a needle prompt, exactly so many; the haystack's end is cut off."""

    def count_tokens(text: str) -> int:
        return len(runner.tokenizer(text, add_special_tokens=False)["input_ids"])

    # The first needle of three lies at a depth of 1/6, far from what is cut.
    sample = tasks.build_tasks(["needle"], seed, [length + 40], 3, count_tokens)[0]
    rendered = tasks.render(sample, runner.tokenizer)
    ids, num_suffix = list(rendered.token_ids), rendered.num_suffix_tokens
    surplus = len(ids) - length
    assert surplus >= 0
    end = len(ids) - num_suffix
    return ids[: end - surplus] + ids[end:]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runner = Runner(arguments.model, "float32")
    cases = []
    for press, window, sizes in CASES:
        for seed in SEEDS:
            for prompt_pages, kept_pages in sizes:
                prompt_len, kept = prompt_pages * PAGE + window, kept_pages * PAGE + window
                prompt = {
                    "token_ids": prompt_of_length(runner, seed, prompt_len),
                    "max_new_tokens": MAX_NEW_TOKENS,
                }
                # kvpress keeps int(n (1 - ratio)); half a token keeps rounding out of it.
                job = Job.of(press, 1 - (kept + 0.5) / prompt_len, window)
                full, answer = runner.answer(prompt, "aware", [Job("full", 0.0), job])
                assert answer["kept_tokens"] == kept, answer
                cases.append(
                    {
                        "press": press,
                        "window": window,
                        "prompt_len": prompt_len,
                        "kept": kept,
                        "prompt": prompt["token_ids"],
                        "full": full["token_ids"],
                        "answer": answer["token_ids"],
                    }
                )
                print(f"{press} {kept}/{prompt_len}: {answer['text']!r}, full {full['text']!r}")
    data = {"versions": versions(), "model": Path(arguments.model).name, "cases": cases}
    OUTPUT.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
