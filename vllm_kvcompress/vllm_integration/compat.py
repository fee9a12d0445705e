"""Which vLLM this release works with.

The names and signatures of vLLM that this folder relies on are listed, by file, in
scripts/vllm_contract.py, which checks them against any vLLM's wheel.
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = SpecifierSet(">=0.32.0,<0.34")


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is outside the range this release was built for."""


def check_vllm_version() -> None:
    """Raise UnsupportedVLLMError unless the installed vLLM is supported."""
    import vllm

    # Not the distribution's version: that goes by more than one name.
    found = vllm.__version__
    try:
        is_supported = SUPPORTED_VLLM.contains(Version(found), prereleases=True)
    except InvalidVersion:
        # A source tree without build metadata calls itself "dev".
        is_supported = False
    if not is_supported:
        own = metadata.version("vllm-kvcompress")
        raise UnsupportedVLLMError(
            f"vllm-kvcompress {own} works with vLLM {SUPPORTED_VLLM}; found vLLM {found}"
        )
