"""What settings keep of a prompt and how many requests then fit, before anything is started.

    python examples/plan.py MODEL

MODEL: a folder with a config.json, or a hub name. No weights are read.
"""

import sys

from vllm_kvcompress import KVCompressConfig
from vllm_kvcompress.cli.planning import make_plan

PROMPT_LEN, OUTPUT_LEN, POOL_BYTES = 6000, 500, 4 << 30

settings = [
    KVCompressConfig("span", budget=2048),
    KVCompressConfig("span", ratio=0.875),
    KVCompressConfig("pyramidkv", budget=1024, options={"beta": 4}),
]
print(f"a prompt of {PROMPT_LEN} tokens and {OUTPUT_LEN} of output, a pool of 4 GiB")
for config in settings:
    plan = make_plan(
        config, sys.argv[1], [PROMPT_LEN], output_len=OUTPUT_LEN, pool_bytes=POOL_BYTES
    )
    request = plan.requests[0]
    asked = f"budget {config.budget}" if config.ratio is None else f"ratio {config.ratio}"
    print(
        f"{config.method}, {asked}: keeps {request.kept_tokens} tokens per head, "
        f"{request.held_bytes / 2**20:.0f} MiB instead of {request.full_bytes / 2**20:.0f}; "
        f"{request.fits} requests fit instead of {request.full_fits}"
    )
