"""Entry point of the plugin: adds the flags, and turns `kv_compress` settings into an engine.

Three methods of `EngineArgs` are wrapped, each calling the original; vLLM has no registry for
what they do:

* `add_cli_args`: a plugin cannot add flags otherwise (vLLM loads plugins there so that it can).
* `from_cli_args`: joins our flags with `--additional-config`, which argparse stores over them.
* `create_engine_config`: the one place that every front end passes with all settings known,
  before any process starts. Needed to name our worker class and refuse what cannot work.

Nothing else of vLLM is touched, and nothing happens until `kv_compress` is set. Where vLLM runs as
a command, an error of ours that nobody caught is printed as one line.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.flags import add_flags, merge_flags
from vllm_kvcompress.vllm_integration.compat import UnsupportedVLLMError
from vllm_kvcompress.vllm_integration.validate import check_engine_config, prepare_engine_args


def register() -> None:
    """Install the wrappers; safe to call any number of times in any process."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_kv_compress_registered", False):
        return
    # Its methods are replaced, which no type has a word for.
    patched: Any = EngineArgs
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = patched.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def add_cli_args_with_flags(parser: Any) -> Any:
        return add_flags(add_cli_args(parser))

    @functools.wraps(from_cli_args)
    def from_cli_args_with_flags(cls: type[EngineArgs], args: Any) -> EngineArgs:
        # Only commands come by here: who calls Python gets the traceback to their own line.
        _print_errors_as_lines()
        merge_flags(args)
        return from_cli_args(cls, args)

    @functools.wraps(create_engine_config)
    def create_checked_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = prepare_engine_args(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        if config is not None:
            check_engine_config(vllm_config, config)
        return vllm_config

    patched.add_cli_args = staticmethod(add_cli_args_with_flags)
    patched.from_cli_args = classmethod(from_cli_args_with_flags)
    patched.create_engine_config = create_checked_engine_config
    patched._kv_compress_registered = True


def _print_errors_as_lines() -> None:
    """Print our own uncaught errors without their traceback, of vLLM's code only; idempotent."""
    if getattr(sys.excepthook, "_is_kv_compress", False):
        return
    print_other_errors = sys.excepthook

    @functools.wraps(print_other_errors)
    def print_error(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, KVCompressConfigError | UnsupportedVLLMError):
            print(f"vllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            print_other_errors(kind, error, traceback)

    print_error._is_kv_compress = True  # type: ignore[attr-defined]
    sys.excepthook = print_error
