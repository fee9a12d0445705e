"""kvpress' own answers and likelihoods on given token ids, for the same table as our engine's.

Runs where kvpress 0.5.5 is installed (kvpress_env.sh), without vLLM and without this
package. Rows of the inputs and of the output, one JSON object a line:

    prompts   "id", "token_ids", "num_suffix_tokens", "max_new_tokens"; other fields are passed on
    passages  "id", "context_ids", "continuation_ids"; other fields are passed on
    out       "kind" ("answer" or "likelihood"), "mode", "press" ("full" = nothing removed), "ratio"
              (fraction removed), "id", "prompt_len", "kept_tokens" (prompt tokens left in the cache
              per KV head and layer on average), "window", "dtype", "model", "versions", and
              "text", "token_ids" of an answer (with the token that ended it), or
              "kl", "nll" of a continuation, as in likelihood.py (mean per token, nats)

Modes: 'aware' compresses the whole prompt; 'agnostic' compresses all but the last
num_suffix_tokens tokens and computes those after it. Passages are always 'aware'. Positions stay
those of the whole prompt. What the output holds already is not computed again.

Every press' own forward hook is called on one ordinary prefill's tensors (h2o gets eager
attention weights of the same layer inputs), and what it leaves, with kvpress' masks for presses
that have a budget per head, is decoded by kvpress' own patched attention, all presses of a prompt
as one batch. kvpress_check.py compares that with `with press(model): ...`, fed token by token.

bfloat16 is the quicker type where the CPU has it (1.5 times float32 on an EPYC with avx512_bf16,
SmolLM2-135M). On a busy machine one thread is many times quicker than two.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import kvpress
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path.insert(0, str(HERE.parent))

from quality.kvpress_jobs import FULL, PRESSES, Job, JobCaches, LayerMemo, attend_jobs

MODES = ("aware", "agnostic")
# Input fields that are not passed on to the output.
INPUTS = {"token_ids", "num_suffix_tokens", "max_new_tokens", "context_ids", "continuation_ids"}
# Bounds what one batched forward holds.
TOKENS_PER_FORWARD = 1024
JOBS_ATTENTION = "kvpress_jobs"


class Runner:
    """One model, and presses on its caches.

    Args:
        folder: of the model, or its hub name.
        dtype: name of the model's type.
    """

    def __init__(self, folder: str, dtype: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        if "sliding_attention" in (getattr(self.model.config, "layer_types", None) or ()):
            sys.exit("models with sliding windows are not supported")
        self.modules = [layer.self_attn for layer in self.model.model.layers]
        for module in self.modules:
            # As kvpress does; Expected Attention reads it.
            module.rotary_emb = self.model.model.rotary_emb
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = set(eos) if isinstance(eos, list) else {eos}
        transformers.AttentionInterface.register(JOBS_ATTENTION, attend_jobs)

    @contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Another attention implementation for a while."""
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = implementation
        try:
            yield
        finally:
            self.model.config._attn_implementation = before

    def prefill(self, token_ids: Sequence[int], jobs: Sequence[Job]) -> torch.Tensor:
        """Compute the prompt once and fill every job's cache; returns the last logits [V]."""
        memo = LayerMemo()
        for job in jobs:
            if job.press is not None:
                job.press.post_init_from_model(self.model)
                memo.wrap_scores(job)
        value_norm = kvpress.CriticalKVPress.vwl1norm
        kvpress.CriticalKVPress.vwl1norm = staticmethod(memo.wrap("value norm", value_norm))
        hook = functools.partial(self._press, jobs, memo)
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self.modules]
        try:
            cache = transformers.DynamicCache()
            ids = torch.tensor([list(token_ids)])
            return self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        finally:
            kvpress.CriticalKVPress.vwl1norm = staticmethod(value_norm)
            for handle in handles:
                handle.remove()

    def _press(
        self,
        jobs: Sequence[Job],
        memo: LayerMemo,
        module: nn.Module,
        args: Any,
        kwargs: dict,
        output: Any,
    ) -> None:
        """One layer's forward hook: every job's press on the layer's full cache."""
        memo.values.clear()
        full = kwargs["past_key_values"].layers[module.layer_idx]
        weights = None
        for job in jobs:
            # The jobs share the full tensors: presses and updates make new ones.
            layer = DynamicLayer()
            layer.lazy_initialization(full.keys, full.values)
            layer.keys, layer.values = full.keys, full.values
            job.cache.layers.append(layer)
            module.masked_key_indices = None
            if job.press is not None:
                seen = None
                if isinstance(job.press, kvpress.ObservedAttentionPress):
                    if weights is None:
                        weights = self._weights(module, kwargs)
                    seen = weights
                own = {**kwargs, "past_key_values": job.cache}
                job.press.forward_hook(module, args, own, [output[0], seen])
            job.masked.append(module.masked_key_indices)
        module.masked_key_indices = None

    def _weights(self, module: nn.Module, kwargs: dict) -> torch.Tensor:
        """[1, Hq, n, n] attention weights of a layer as eager attention returns them."""
        hidden = kwargs["hidden_states"]
        num_tokens = hidden.shape[1]
        mask = torch.full((num_tokens, num_tokens), torch.finfo(hidden.dtype).min)
        with self.attention("eager"):
            return module.forward(
                hidden_states=hidden,
                position_embeddings=kwargs["position_embeddings"],
                attention_mask=mask.triu(1).to(hidden.dtype)[None, None],
            )[1]

    def extend(
        self, jobs: Sequence[Job], token_ids: Sequence[Sequence[int]], position: int, keep: int = 0
    ) -> torch.Tensor:
        """Compute T further tokens of each job from a position of the whole prompt on.

        Args:
            jobs: J of them; their caches grow.
            token_ids: [J][T].
            position: of the first of the tokens.
            keep: last tokens whose logits are wanted; 0 = all.

        Returns:
            [J, keep, V] logits.
        """
        num_tokens = len(token_ids[0])
        positions = torch.arange(position, position + num_tokens)
        logits = []
        for group in groups(len(jobs), num_tokens):
            rows = jobs[group]
            with self.attention(JOBS_ATTENTION):
                output = self.model(
                    torch.tensor([list(ids) for ids in token_ids[group]]),
                    past_key_values=JobCaches(rows),
                    position_ids=positions.expand(len(rows), -1),
                    cache_position=positions,
                    logits_to_keep=keep,
                    jobs=rows,
                )
            logits.append(output.logits)
        return torch.cat(logits)

    def generate(
        self, jobs: Sequence[Job], logits: torch.Tensor, position: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers [J] from the logits [J, V] for the token at a position."""
        answers = [[token] for token in logits.argmax(dim=-1).tolist()]
        for step in range(max_new_tokens - 1):
            going = [i for i, answer in enumerate(answers) if answer[-1] not in self.eos_ids]
            if not going:
                break
            last = [[answers[i][-1]] for i in going]
            logits = self.extend([jobs[i] for i in going], last, position + step, keep=1)
            for i, token in zip(going, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
                answers[i].append(token)
        return answers

    def answer(self, prompt: dict, mode: str, jobs: Sequence[Job]) -> list[dict]:
        """Every job's answer to a prompt."""
        logits, kept = self.read(prompt, mode, jobs)
        prompt_len = len(prompt["token_ids"])
        answers = self.generate(jobs, logits, prompt_len, prompt["max_new_tokens"])
        return [
            {
                "text": self.tokenizer.decode(answer, skip_special_tokens=True),
                "token_ids": answer,
                "prompt_len": prompt_len,
                "kept_tokens": kept_tokens,
            }
            for answer, kept_tokens in zip(answers, kept, strict=True)
        ]

    def read(
        self, prompt: dict, mode: str, jobs: Sequence[Job]
    ) -> tuple[torch.Tensor, list[float]]:
        """Every job's logits [J, V] at the prompt's end, and tokens kept by then."""
        token_ids = prompt["token_ids"]
        if mode == "aware":
            logits = self.prefill(token_ids, jobs).expand(len(jobs), -1)
        else:
            num_context = len(token_ids) - prompt["num_suffix_tokens"]
            if not 0 < num_context < len(token_ids):
                raise ValueError(f"prompt {prompt['id']}: bad num_suffix_tokens for 'agnostic'")
            self.prefill(token_ids[:num_context], jobs)
            suffix = [token_ids[num_context:]] * len(jobs)
            logits = self.extend(jobs, suffix, num_context, keep=1)[:, -1]
        return logits, [job.kept_tokens() for job in jobs]

    def likelihood(self, passage: dict, jobs: Sequence[Job]) -> list[dict]:
        """Every job's KL and NLL of a passage's continuation; the first job is the full cache."""
        context, continuation = passage["context_ids"], passage["continuation_ids"]
        assert jobs[0].press is None
        first = self.prefill(context, jobs)[None]
        kept = [job.kept_tokens() for job in jobs]
        wanted, results = None, []
        for group in groups(len(jobs), len(continuation)):
            later = [continuation[:-1]] * len(jobs[group])
            # The first token's distribution is the prefill's, whatever was removed.
            logits = self.extend(jobs[group], later, len(context)) if later[0] else None
            for row, kept_tokens in enumerate(kept[group]):
                own = first if logits is None else torch.cat([first, logits[row]])
                log_probs = own.float().log_softmax(dim=-1)
                if wanted is None:
                    wanted = log_probs
                nll = -log_probs.gather(1, torch.tensor(continuation)[:, None]).mean()
                kl = (wanted.exp() * (wanted - log_probs)).sum(dim=-1).mean()
                results.append(
                    {
                        "kl": float(kl),
                        "nll": float(nll),
                        "prompt_len": len(context),
                        "kept_tokens": kept_tokens,
                    }
                )
        return results


def groups(num_jobs: int, num_tokens: int) -> Iterator[slice]:
    """Slices of the jobs whose tokens, so many each, fit one forward."""
    size = max(1, TOKENS_PER_FORWARD // max(1, num_tokens))
    return (slice(start, start + size) for start in range(0, num_jobs, size))


class Output:
    """The output file, appended to, and what it holds already."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.common = common
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            print(f"{path}: dropping a last line that was cut off", file=sys.stderr)
            path.write_text(whole)
        self.done = {self._key(json.loads(line)) for line in whole.splitlines()}
        self.file: TextIO = path.open("a")

    @staticmethod
    def _key(row: dict) -> tuple:
        names = ("kind", "mode", "press", "ratio", "id", "window", "dtype", "model")
        return tuple(row[name] for name in names)

    def missing(self, kind: str, mode: str, item: dict, jobs: list[Job]) -> list[Job]:
        """The jobs that the file does not hold for a prompt or passage."""
        return [job for job in jobs if self._key(self._row(kind, mode, item, job)) not in self.done]

    def _row(self, kind: str, mode: str, item: dict, job: Job) -> dict:
        rest = {name: value for name, value in item.items() if name not in INPUTS}
        own = {"press": job.name, "ratio": job.ratio, "window": job.window}
        return {**rest, "kind": kind, "mode": mode, "id": item["id"], **own, **self.common}

    def write(self, kind: str, mode: str, item: dict, jobs: list[Job], results: list[dict]) -> None:
        """Append one row per job."""
        rows = [
            {**self._row(kind, mode, item, job), **result}
            for job, result in zip(jobs, results, strict=True)
        ]
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()
        self.done.update(self._key(row) for row in rows)


class Progress:
    """A plain bar on stderr; one line per step where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.start = total, 0, time.monotonic()

    def step(self, what: str) -> None:
        """One more item is done."""
        self.count += 1
        passed = time.monotonic() - self.start
        left = passed / self.count * (self.total - self.count)
        bar = "#" * (20 * self.count // self.total)
        text = f"[{bar:<20}] {self.count}/{self.total} {passed:.0f} s, {left:.0f} s left, {what}"
        is_terminal = sys.stderr.isatty()
        is_last = self.count == self.total
        start, end = ("\r\x1b[K", "\n" if is_last else "") if is_terminal else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}


def read_rows(path: Path | None) -> list[dict]:
    """JSON objects of a file, one a line; none without a file."""
    if path is None:
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def run(arguments: argparse.Namespace, runner: Runner) -> None:
    """Everything that the output does not hold yet."""
    common = {
        "dtype": arguments.dtype,
        "model": Path(arguments.model).name,
        "versions": versions(),
    }
    output = Output(arguments.out, common)
    items = [
        ("answer", mode, item) for item in read_rows(arguments.prompts) for mode in arguments.modes
    ]
    items += [("likelihood", "aware", item) for item in read_rows(arguments.passages)]
    progress = Progress(len(items))
    for kind, mode, item in items:
        jobs = output.missing(kind, mode, item, make_jobs(arguments))
        if kind == "answer" and jobs:
            output.write(kind, mode, item, jobs, runner.answer(item, mode, jobs))
        elif jobs:
            # The reference is needed even if its row is there.
            added = jobs[0].name != FULL
            results = runner.likelihood(item, [Job(FULL, 0.0)] * added + jobs)
            output.write(kind, mode, item, jobs, results[added:])
        progress.step(f"{kind} {mode} {item['id']}")


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """The full cache, then every press at every ratio."""
    pairs = [(name, ratio) for name in arguments.presses for ratio in arguments.ratios]
    return [Job(FULL, 0.0)] + [Job.of(name, ratio, arguments.window) for name, ratio in pairs]


def make_runner(arguments: argparse.Namespace) -> Runner:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    return Runner(arguments.model, arguments.dtype)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--prompts", type=Path, help="JSON lines, see above")
    parser.add_argument("--passages", type=Path, help="JSON lines, see above")
    parser.add_argument(
        "--presses", default=",".join(PRESSES), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.875])
    parser.add_argument("--modes", default="aware", help="comma-separated: aware, agnostic")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--window", type=int, help="queries of SnapKV's kind (default: kvpress')")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    arguments = parser.parse_args()
    for option, known in (("presses", PRESSES), ("modes", MODES)):
        names = [name for name in getattr(arguments, option).split(",") if name]
        unknown = sorted(set(names) - set(known))
        if unknown or not names:
            parser.error(f"--{option}: unknown {unknown}; there are {', '.join(known)}")
        setattr(arguments, option, names)
    if not all(0 < ratio < 1 for ratio in arguments.ratios):
        parser.error(f"--ratios: {arguments.ratios} must lie between 0 and 1")
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    run(arguments, make_runner(arguments))


if __name__ == "__main__":
    main()
