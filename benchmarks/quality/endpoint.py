"""The same prompts through any OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from progress import Progress

from quality.plan import Prompt
from quality.scoring import score
from quality.store import Store

CONCURRENCY = 8


def run_endpoint(
    url: str, label: str, store: Store, prompts: Sequence[Prompt], common: dict[str, Any]
) -> None:
    """Ask for greedy answers to every prompt that the store has none for.

    The server's method is its own, so a run has one label; what it keeps and the likelihood
    probes cannot be seen from outside (vLLM's server tells the former in its log).

    Args:
        url: base URL, e.g. http://localhost:8000/v1.
        label: name of the rows; 'full' marks the run that agreement is measured against.
        store: where results go.
        prompts: of all tasks.
        common: fields of every row.

    Raises:
        openai.OpenAIError: if the endpoint does not answer.
    """
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    key = {**common, "method": label, "ratio": 0.0, "mode": "aware"}
    missing = [
        prompt
        for prompt in prompts
        if not store.has(**key, task=prompt.sample.task, sample_id=prompt.sample.sample_id)
    ]
    full_ids = {
        (row["task"], row["sample_id"]): row["token_ids"]
        for row in store.rows
        if row["engine"] == common["engine"] and row["method"] == "full"
    }

    def ask(prompt: Prompt) -> dict[str, Any]:
        sample = prompt.sample
        reply = client.completions.create(
            model=model,
            prompt=list(prompt.rendered.token_ids),
            max_tokens=sample.max_new_tokens,
            temperature=0,
            # vLLM's: the ids of the answer, which agreement compares.
            extra_body={"return_token_ids": True},
        )
        choice = reply.choices[0]
        token_ids = list(getattr(choice, "token_ids", None) or [])
        if sample.metric == "agreement" and not token_ids:
            raise SystemExit(f"task {sample.task!r} needs token ids, which {url} does not return")
        return {
            **key,
            "task": sample.task,
            "sample_id": sample.sample_id,
            "meta": dict(sample.meta),
            "text": choice.text,
            "token_ids": token_ids,
            "score": score(
                sample, choice.text, token_ids, full_ids.get((sample.task, sample.sample_id))
            ),
            "prompt_len": len(prompt.rendered.token_ids),
            "suffix_tokens": 0,
            "kept_tokens": None,
        }

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        progress = Progress(label, len(missing), "prompts")
        for row in pool.map(ask, missing):
            store.add([row])
            progress.advance()
