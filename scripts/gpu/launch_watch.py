"""Which Triton kernels are compiled, or loaded for the first time, while an engine serves."""

from __future__ import annotations

from types import TracebackType
from typing import Any

OURS = "vllm_kvcompress."


class LaunchWatch:
    """Names of kernels that Triton did not have ready, while it is entered.

    Triton calls the hook that this sets after it has compiled a kernel or has found it in its cache
    on disk, but not for one that this process has launched before. The hook is the whole process's;
    leaving puts back what was there.

    Attributes:
        ours, others: this package's kernels, and those of vLLM and torch.
    """

    def __init__(self) -> None:
        self.ours: list[str] = []
        self.others: list[str] = []
        self._before: Any = None

    def __enter__(self) -> LaunchWatch:
        from triton import knobs

        self._before = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self._note
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = self._before

    def _note(self, **known: Any) -> Any:
        kernel = known.get("fn")
        is_ours = str(getattr(kernel, "module", "")).startswith(OURS)
        (self.ours if is_ours else self.others).append(str(getattr(kernel, "name", kernel)))
        return self._before(**known) if self._before is not None else None
