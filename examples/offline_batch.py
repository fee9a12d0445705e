"""Several long prompts through one engine, and how many of their tokens it kept.

    python examples/offline_batch.py MODEL

MODEL: a folder or a hub name, e.g. .cache/models/smollm2 (scripts/setup.sh builds it).
"""

import sys

from vllm import SamplingParams

from vllm_kvcompress import LLM

STORY = "The grass was high, the sky was clear, and nobody came along the road that day. " * 60


def conversation(place: str, number: int) -> list[dict[str, str]]:
    """A long story with one fact in its middle, and a question about the fact."""
    fact = f"The number of the house in {place} is {number}. "
    question = f"\n\nWhat is the number of the house in {place}? Answer with the number only."
    return [{"role": "user", "content": STORY + fact + STORY + question}]


# vLLM starts a process that reads this file again; without this line it would start an engine too.
if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        kv_compress="span",
        kv_compress_budget=512,
        max_model_len=4096,
        kv_cache_memory_bytes=512 << 20,
        # Starts sooner. Leave it out where speed counts.
        enforce_eager=True,
    )
    facts = {"Rome": 48213, "Oslo": 90417, "Lima": 36655}
    conversations = [conversation(place, number) for place, number in facts.items()]
    outputs = llm.chat(conversations, SamplingParams(max_tokens=16, temperature=0))
    kept = {entry["request_id"]: entry for entry in llm.kv_compress_stats()["requests"]}
    for place, output in zip(facts, outputs, strict=True):
        print(f"{place}: {output.outputs[0].text!r}")
    for entry in kept.values():
        print(
            f"kept {entry['kept_tokens']:.0f} of {entry['prompt_len']} tokens per head, "
            f"{entry['blocks_returned']} blocks went back to the pool"
        )
