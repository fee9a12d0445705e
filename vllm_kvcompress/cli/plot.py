"""The picture of `vllm-kvcompress plan --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError

if TYPE_CHECKING:
    from vllm_kvcompress.cli.plan import RequestPlan


def draw(config: KVCompressConfig, plans: Sequence[RequestPlan], path: str) -> None:
    """Write pages per layer and memory per request to a PNG.

    Raises:
        KVCompressConfigError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise KVCompressConfigError(
            "--plot needs matplotlib: pip install 'vllm-kvcompress[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for plan in plans:
        if not plan.compressed:
            continue
        pages = plan.pages_per_layer
        if pages is None:
            left.axhline(plan.region_blocks, linestyle="--", label=f"{plan.prompt_len} (mean)")
        else:
            left.step(range(len(pages)), pages, where="mid", label=str(plan.prompt_len))
    left.set(xlabel="layer", ylabel="region pages per KV head", title=config.method, ylim=(0, None))
    if left.get_legend_handles_labels()[0]:
        left.legend(title="prompt tokens")
    places = range(len(plans))
    right.bar([x - 0.2 for x in places], [p.full_bytes / 2**20 for p in plans], 0.4, label="full")
    right.bar([x + 0.2 for x in places], [p.bytes / 2**20 for p in plans], 0.4, label=config.method)
    right.set_xticks(list(places), [f"{p.prompt_len}+{p.output_len}" for p in plans])
    right.set(xlabel="prompt + output tokens", ylabel="MiB per request", title="KV memory")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
