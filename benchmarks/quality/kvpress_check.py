"""Check of kvpress_runner.py against kvpress used as it is meant to be, on the first prompt.

Takes the runner's arguments (--out is not written to). Use it with --dtype float32, since
bfloat16 rounds differently in a batch; exits with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import kvpress
import torch
import transformers

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path.insert(0, str(HERE.parent))

from quality.kvpress_jobs import Job
from quality.kvpress_runner import Runner, make_jobs, make_runner, parse_arguments, read_rows


def check(arguments: argparse.Namespace, runner: Runner) -> bool:
    """Compare with kvpress used as it is meant to be, on the first prompt."""
    prompt = read_rows(arguments.prompts)[0]
    is_fine = True
    for mode in arguments.modes:
        jobs, ends = (make_jobs(arguments) for _ in range(2))
        # Decoding would grow the caches that are compared.
        end_logits, _ = runner.read(prompt, mode, ends)
        answers = runner.answer(prompt, mode, jobs)
        for job, end, logits, answer in zip(jobs, ends, end_logits, answers, strict=True):
            other = Job.of(job.name, job.ratio, job.window)
            plain_logits, plain_answer = plain_kvpress(runner, prompt, mode, other)
            same_cache = sum(
                a.shape == b.shape and torch.allclose(a, b, atol=1e-3)
                for a, b in zip(visible_keys(end), visible_keys(other), strict=True)
            )
            is_same = answer["token_ids"] == plain_answer
            is_fine &= is_same
            verdict = "same answer" if is_same else "ANSWER DIFFERS"
            print(
                f"{mode:<9}{job.name:<23}{job.ratio:<6}{verdict:<16}"
                f"same cache in {same_cache}/{len(jobs[0].masked)} layers, "
                f"logits within {float((logits - plain_logits).abs().max()):.1e}, "
                f"kept {answer['kept_tokens']:.2f}/{answer['prompt_len']}, "
                f"pipeline: {pipeline_verdict(runner, prompt, mode, job, answer['text'])}, "
                f"{answer['text']!r}",
                flush=True,
            )
    return is_fine


def visible_keys(job: Job) -> Iterator[torch.Tensor]:
    """[1, H, tokens, d] keys of each layer, those that kvpress masks as zeros."""
    for layer, masked in zip(job.cache.layers, job.masked, strict=True):
        keys = layer.keys.clone()
        if masked is not None:
            keys[masked] = 0
        yield keys


def plain_kvpress(
    runner: Runner, prompt: dict, mode: str, job: Job
) -> tuple[torch.Tensor, list[int]]:
    """Logits [V] at the prompt's end and answer by `with press(model)`, token by token.

    The job is left as it is at the prompt's end.
    """
    ids = torch.tensor([prompt["token_ids"]])
    prompt_len = ids.shape[1]
    num_context = prompt_len - (prompt["num_suffix_tokens"] if mode == "agnostic" else 0)
    model, cache = runner.model, transformers.DynamicCache()

    def feed(token: torch.Tensor, position: int) -> torch.Tensor:
        # Kept apart from `Runner.extend`: no mask, no cache position, one row.
        position_ids = torch.tensor([[position]])
        return model(token, past_key_values=cache, position_ids=position_ids).logits[0, -1]

    for module in runner.modules:
        module.masked_key_indices = None
    is_eager = isinstance(job.press, kvpress.ObservedAttentionPress)
    with runner.attention("eager" if is_eager else "sdpa"):
        with job.press(model) if job.press is not None else nullcontext():
            logits = model(ids[:, :num_context], past_key_values=cache).logits[0, -1]
        for position in range(num_context, prompt_len):
            logits = feed(ids[:, position : position + 1], position)
        job.cache = copy.deepcopy(cache)
        job.masked = [module.masked_key_indices for module in runner.modules]
        end_logits, answer = logits, [int(logits.argmax())]
        while answer[-1] not in runner.eos_ids and len(answer) < prompt["max_new_tokens"]:
            logits = feed(torch.tensor([answer[-1:]]), prompt_len + len(answer) - 1)
            answer.append(int(logits.argmax()))
    return end_logits, answer


def pipeline_verdict(runner: Runner, prompt: dict, mode: str, job: Job, text: str) -> str:
    """Whether kvpress' own pipeline, which is 'agnostic', gives the same text."""
    if mode != "agnostic":
        return "-"
    num_suffix = prompt["num_suffix_tokens"]
    ids = torch.tensor([prompt["token_ids"]])
    inputs = {"context_ids": ids[:, :-num_suffix], "questions_ids": [ids[:, -num_suffix:]]}
    pipeline = kvpress.KVPressTextGenerationPipeline(model=runner.model, tokenizer=runner.tokenizer)
    press = Job.of(job.name, job.ratio, job.window).press
    is_eager = isinstance(press, kvpress.ObservedAttentionPress)
    try:
        with runner.attention("eager" if is_eager else "sdpa"):
            answers = pipeline._forward(inputs, prompt["max_new_tokens"], press)
    except RuntimeError as error:
        return f"{type(error).__name__} {str(error).splitlines()[0]}"
    return "same text" if answers[0] == text else f"{answers[0]!r}"


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    sys.exit(0 if check(arguments, make_runner(arguments)) else 1)


if __name__ == "__main__":
    main()
