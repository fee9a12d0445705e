"""Every name of vLLM that vllm_integration relies on, checked without importing vLLM.

    python scripts/vllm_contract.py WHEEL_OR_FOLDER [--record FILE]

reads the sources of a vLLM (its wheel, or its package folder) and lists what has changed; exit
status 1 if anything has. `--record` writes down what was found, for tests/data.

An entry of the contract is `Name`, `Class.attribute`, or a function with parameters. `f(a, b)` has
exactly these: it is overridden or wrapped, so one more that vLLM passes would break. `f(a, b, ...)`
takes at least these: it is called.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# By file below the package's folder.
CONTRACT: dict[str, tuple[str, ...]] = {
    "_custom_ops.py": (
        "cpu_attention_with_kv_cache(query, key_cache, value_cache, output, query_start_loc, "
        "seq_lens, scale, causal, alibi_slopes, sliding_window, block_table, softcap, "
        "scheduler_metadata, s_aux, k_scale, v_scale, kv_cache_dtype, ...)",
        "cpu_attn_get_scheduler_metadata(num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, "
        "dtype, query_start_loc, causal, sliding_window_size, isa, enable_kv_split, "
        "kv_cache_dtype, ...)",
        "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, ...)",
    ),
    "config/attention.py": (
        "AttentionConfig.backend",
        "AttentionConfig.backend_per_kind",
    ),
    "config/cache.py": ("CacheConfig.kv_sharing_fast_prefill",),
    "config/compilation.py": ("CompilationConfig.max_cudagraph_capture_size",),
    "config/model.py": ("ModelConfig.is_mm_prefix_lm", "ModelConfig.rswa_window"),
    "config/parallel.py": (
        "ParallelConfig.distributed_executor_backend",
        "ParallelConfig.use_ubatching",
    ),
    "config/scheduler.py": (
        "SchedulerConfig.async_scheduling",
        "SchedulerConfig.disable_hybrid_kv_cache_manager",
        "SchedulerConfig.long_prefill_token_threshold",
        "SchedulerConfig.max_num_batched_tokens",
        "SchedulerConfig.max_num_scheduled_tokens",
        "SchedulerConfig.max_num_seqs",
        "SchedulerConfig.scheduler_cls",
    ),
    "config/vllm.py": ("VllmConfig.additional_config", "VllmConfig.use_v2_model_runner"),
    "engine/arg_utils.py": (
        "EngineArgs.add_cli_args(parser)",
        "EngineArgs.additional_config",
        "EngineArgs.block_size",
        "EngineArgs.create_engine_config(self, ...)",
        "EngineArgs.from_cli_args(cls, args)",
        "EngineArgs.worker_cls",
    ),
    "envs.py": ("VLLM_BATCH_INVARIANT",),
    "logger.py": ("init_logger(name)",),
    "model_executor/layers/attention/attention.py": (
        "Attention.get_attn_backend(self)",
        "Attention.kv_sharing_target_layer_name",
    ),
    "model_executor/layers/linear.py": (
        "LinearBase.output_size",
        "LinearBase.quant_method",
        "RowParallelLinear.input_size_per_partition",
        "UnquantizedLinearMethod",
    ),
    "model_executor/layers/rotary_embedding/base.py": ("RotaryEmbeddingBase",),
    "model_executor/models/utils.py": ("extract_layer_index(layer_name, ...)",),
    "sampling_params.py": (
        "SamplingParams.ignore_eos",
        "SamplingParams.min_tokens",
        "SamplingParams.stop",
        "SamplingParams.stop_token_ids",
    ),
    "utils/torch_utils.py": ("canonicalize_singleton_dim_strides(t)",),
    "v1/attention/backend.py": (
        "AttentionBackend.forward_includes_kv_cache_update",
        "AttentionBackend.get_builder_cls()",
        "AttentionBackend.get_impl_cls()",
        "AttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)",
        "AttentionBackend.supported_kv_cache_layouts(cls)",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE",
        "AttentionMetadataBuilder._init_reorder_batch_threshold(self, reorder_batch_threshold, "
        "...)",
        "CommonAttentionMetadata._num_computed_tokens_cache",
        "CommonAttentionMetadata._token_to_req_indices_cache",
        "CommonAttentionMetadata.block_table_tensor",
        "CommonAttentionMetadata.is_prefilling",
        "CommonAttentionMetadata.max_query_len",
        "CommonAttentionMetadata.max_seq_len",
        "CommonAttentionMetadata.num_actual_tokens",
        "CommonAttentionMetadata.num_reqs",
        "CommonAttentionMetadata.query_start_loc",
        "CommonAttentionMetadata.query_start_loc_cpu",
        "CommonAttentionMetadata.req_idx",
        "CommonAttentionMetadata.seq_lens",
        "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        "CommonAttentionMetadata.slot_mapping",
        "MultipleOf",
    ),
    "v1/attention/backends/cpu_attn.py": (
        "CPUAttentionBackend",
        "CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, value, kv_cache, "
        "slot_mapping)",
        "CPUAttentionBackendImpl.kv_sharing_target_layer_name",
        "CPUAttentionBackendImpl.forward(self, layer, query, key, value, kv_cache, "
        "attn_metadata, output, output_scale, output_block_scale)",
        "CPUAttentionMetadata.slot_mapping",
        "CPUAttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, "
        "fast_build)",
    ),
    "v1/attention/backends/flash_attn.py": (
        "FlashAttentionBackend.get_name()",
        "FlashAttentionBackend.supports_batch_invariance(cls)",
        "FlashAttentionBackend.supports_head_size(cls, head_size)",
        "FlashAttentionBackend.supports_mm_prefix(cls)",
        "FlashAttentionBackend.supports_non_causal(cls)",
        "FlashAttentionBackend.supports_rswa(cls)",
        "FlashAttentionImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)",
        "FlashAttentionImpl.kv_sharing_target_layer_name",
        "FlashAttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, "
        "output, output_scale, output_block_scale)",
        "FlashAttentionMetadata.block_table",
        "FlashAttentionMetadata.max_num_splits",
        "FlashAttentionMetadata.max_query_len",
        "FlashAttentionMetadata.max_seq_len",
        "FlashAttentionMetadata.num_actual_tokens",
        "FlashAttentionMetadata.query_start_loc",
        "FlashAttentionMetadata.scheduler_metadata",
        "FlashAttentionMetadata.seq_lens",
        "FlashAttentionMetadata.slot_mapping",
        "FlashAttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, "
        "fast_build)",
        "FlashAttentionMetadataBuilder.get_cudagraph_support(cls, vllm_config, kv_cache_spec)",
        "FlashAttentionMetadataBuilder.supports_update_block_table",
        "FlashAttentionMetadataBuilder.use_full_cuda_graph",
    ),
    "v1/attention/backends/registry.py": (
        "AttentionBackendEnum.CPU_ATTN",
        "AttentionBackendEnum.CUSTOM",
        "AttentionBackendEnum.FLASH_ATTN",
        "AttentionBackendEnum.clear_override(self)",
        "register_backend(backend, class_path, ...)",
    ),
    "v1/attention/selector.py": ("_cached_get_attn_backend",),
    "v1/core/block_pool.py": (
        "BlockPool.get_num_free_blocks(self)",
        "BlockPool.num_gpu_blocks",
    ),
    "v1/core/kv_cache_coordinator.py": (
        "KVCacheCoordinator.cache_blocks(self, request, num_computed_tokens)",
        "KVCacheCoordinator.single_type_managers",
    ),
    "v1/core/kv_cache_manager.py": (
        "KVCacheManager.block_pool",
        "KVCacheManager.coordinator",
    ),
    "v1/core/sched/async_scheduler.py": ("AsyncScheduler",),
    "v1/core/sched/scheduler.py": (
        "Scheduler._free_request(self, request, delay_free_blocks)",
        "Scheduler._preempt_request(self, request, timestamp, drop_stale_output)",
        "Scheduler._reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens)",
        "Scheduler.add_request(self, request)",
        "Scheduler.kv_cache_manager",
        "Scheduler.max_model_len",
        "Scheduler.running",
        "Scheduler.schedule(self, ...)",
    ),
    "v1/core/sched/output.py": (
        "CachedRequestData.req_ids",
        "CachedRequestData.resumed_req_ids",
        "NewRequestData.req_id",
        "SchedulerOutput.finished_req_ids",
        "SchedulerOutput.num_scheduled_tokens",
        "SchedulerOutput.preempted_req_ids",
        "SchedulerOutput.scheduled_cached_reqs",
        "SchedulerOutput.scheduled_new_reqs",
    ),
    "v1/core/single_type_kv_cache_manager.py": (
        "FullAttentionManager.find_longest_cache_hit(cls, block_hashes, max_length, "
        "kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block, alignment_tokens, "
        "dcp_world_size, pcp_world_size)",
        "SingleTypeKVCacheManager._null_block",
        "SingleTypeKVCacheManager._remove_blocks_in_range(self, request_id, first_block, "
        "last_block)",
        "SingleTypeKVCacheManager.allocate_new_blocks(self, request_id, num_tokens, "
        "num_tokens_main_model)",
        "SingleTypeKVCacheManager.block_pool",
        "SingleTypeKVCacheManager.block_size",
        "SingleTypeKVCacheManager.enable_caching",
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate(self, request_id, num_tokens, "
        "new_computed_blocks, total_computed_tokens, num_local_computed_tokens, "
        "num_tokens_main_model, apply_admission_cap, prefill_end)",
        "SingleTypeKVCacheManager.pop_blocks_for_free(self, request_id)",
        "SingleTypeKVCacheManager.remove_skipped_blocks(self, request_id, "
        "processed_computed_tokens, num_prompt_tokens)",
        "SingleTypeKVCacheManager.req_to_blocks",
    ),
    "v1/kv_cache_interface.py": (
        "FullAttentionSpec.max_memory_usage_bytes(self, vllm_config)",
        "FullAttentionSpec.merge(cls, specs)",
        "KVCacheConfig.kv_cache_groups",
        "KVCacheGroupSpec.kv_cache_spec",
        "KVCacheGroupSpec.layer_names",
        "KVCacheSpec.max_num_blocks_per_req(self, vllm_config, max_len)",
        "KVCacheSpecKind.FULL_ATTENTION",
        "KVQuantMode.NONE",
        "SlidingWindowSpec",
        "UniformTypeKVCacheSpecs.kv_cache_specs",
    ),
    "v1/kv_cache_layout.py": ("KVCacheLayout.BLHNC",),
    "v1/kv_cache_spec_registry.py": (
        "KVCacheSpecRegistry.get_manager_class(cls, kvcache_spec, ...)",
        "KVCacheSpecRegistry.register(cls, kvcache_spec_cls, manager_class, "
        "uniform_type_base_spec)",
    ),
    "v1/request.py": (
        "Request.is_prefill_chunk",
        "Request.max_tokens",
        "Request.num_computed_tokens",
        "Request.num_output_tokens",
        "Request.num_prompt_tokens",
        "Request.num_tokens",
        "Request.request_id",
        "Request.resumable",
        "Request.sampling_params",
        "Request.skip_reading_prefix_cache",
        "Request.status",
        "Request.streaming_queue",
        "RequestStatus.RUNNING",
    ),
    "v1/sample/logits_processor/interface.py": (
        "LogitsProcessor.apply(self, logits)",
        "LogitsProcessor.is_argmax_invariant(self)",
        "LogitsProcessor.update_state(self, batch_update)",
        "LogitsProcessor.validate_params(cls, sampling_params)",
    ),
    "v1/worker/cpu_worker.py": ("CPUWorker.init_device(self)",),
    "v1/worker/gpu/sample/logits_processor/interface.py": (
        "LogitsProcessor.add_request(self, req_idx, sampling_params)",
        "LogitsProcessor.apply(self, logits, ctx)",
        "LogitsProcessor.validate_params(cls, sampling_params)",
    ),
    "v1/worker/gpu/model_runner.py": (
        "GPUModelRunner.attn_groups",
        "GPUModelRunner.get_model(self)",
        "GPUModelRunner.kv_cache_config",
        "GPUModelRunner.req_states",
    ),
    "v1/worker/gpu/states.py": (
        "RequestState.index_to_req_id",
        "RequestState.prompt_len",
    ),
    "v1/worker/gpu_input_batch.py": (
        "InputBatch.num_prompt_tokens",
        "InputBatch.num_reqs",
        "InputBatch.req_ids",
    ),
    "v1/worker/gpu_model_runner.py": (
        "GPUModelRunner.attn_groups",
        "GPUModelRunner.get_model(self)",
        "GPUModelRunner.input_batch",
        "GPUModelRunner.kv_cache_config",
    ),
    "v1/worker/utils.py": (
        "AttentionGroup.kv_cache_group_id",
        "AttentionGroup.metadata_builders",
    ),
    "v1/worker/gpu_worker.py": (
        "Worker.compile_or_warm_up_model(self)",
        "Worker.determine_available_memory(self)",
        "Worker.execute_model(self, scheduler_output)",
        "Worker.finish_weight_update(self)",
        "Worker.get_kv_cache_spec(self)",
        "Worker.init_device(self)",
        "Worker.initialize_from_config(self, kv_cache_config)",
        "Worker.model_runner",
        "Worker.reload_weights(self, *args, *kwargs)",
        "Worker.shutdown(self)",
        "Worker.total_consumed",
        "Worker.use_v2_model_runner",
    ),
    "vllm_flash_attn/flash_attn_interface.py": (
        "flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, "
        "seqused_k, q_v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, "
        "deterministic, return_attn_probs, block_table, return_softmax_lse, out, "
        "scheduler_metadata, q_descale, k_descale, v_descale, num_splits, output_scale, "
        "fa_version, ...)",
    ),
}


Names = dict[str, list[str] | None]


def find_names(vllm: Path) -> dict[str, Names]:
    """By file of the contract: its names, see `defined_names`; files that are gone are left out.

    Args:
        vllm: its package folder, or a wheel.
    """
    read = _reader(vllm)
    sources = {file: read(file) for file in CONTRACT}
    return {file: defined_names(text) for file, text in sources.items() if text is not None}


def contract_problems(found: dict[str, Names]) -> list[str]:
    """What of the contract the names found do not hold, one line each."""
    problems = []
    for file, entries in CONTRACT.items():
        if file not in found:
            problems.append(f"{file} is gone")
            continue
        for entry in entries:
            problem = _entry_problem(entry, found[file])
            if problem:
                problems.append(f"{file}: {problem}")
    return problems


def record(vllm: Path) -> dict[str, Any]:
    """The wheel's name and SHA-256, and what it has of the contract's names."""
    names = {
        file: {
            name: parameters
            for name, parameters in found.items()
            if any(name == re.match(r"[\w.]+", entry)[0] for entry in CONTRACT[file])
        }
        for file, found in find_names(vllm).items()
    }
    digest = hashlib.sha256(vllm.read_bytes()).hexdigest() if vllm.is_file() else None
    return {"vllm": vllm.name, "sha256": digest, "names": names}


def defined_names(source: str) -> Names:
    """Names of a module and of its classes, with parameters where they are functions.

    Attributes of a class are those of its body and those assigned to self or cls in its methods.
    """
    names: Names = {}
    for node in ast.parse(source).body:
        for inner in _unwrap(node):
            _add(inner, "", names)
            if isinstance(inner, ast.ClassDef):
                for child in inner.body:
                    _add(child, f"{inner.name}.", names)
                for part in ast.walk(inner):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        owner = part.value
                        if isinstance(owner, ast.Name) and owner.id in ("self", "cls"):
                            names.setdefault(f"{inner.name}.{part.attr}", None)
    return names


def _unwrap(node: ast.stmt) -> list[ast.stmt]:
    # A module may define things under a condition.
    return [*node.body, *node.orelse] if isinstance(node, ast.If) else [node]


def _add(node: ast.stmt, prefix: str, names: Names) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        names[prefix + node.name] = None if is_property else _parameters(node.args)
    elif isinstance(node, ast.ClassDef):
        names[prefix + node.name] = None
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                names[prefix + target.id] = None


def _parameters(arguments: ast.arguments) -> list[str]:
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    starred = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return names + [f"*{name}" for name in starred]


def _entry_problem(entry: str, names: Names) -> str | None:
    match = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", entry)
    assert match, entry
    name, wanted = match.groups()
    if name not in names:
        return f"{name} is gone"
    if wanted is None:
        return None
    found = names[name]
    if found is None:
        return f"{name} is no function any more"
    parameters = [part.strip() for part in wanted.split(",") if part.strip()]
    if parameters[-1:] == ["..."]:
        missing = [part for part in parameters[:-1] if part not in found]
        return f"{name} no longer takes {', '.join(missing)}" if missing else None
    if parameters != found:
        return f"{name} takes ({', '.join(found)}), not ({', '.join(parameters)})"
    return None


def _reader(vllm: Path) -> Callable[[str], str | None]:
    """Gives the text of a file of the package, None if there is none."""
    if vllm.is_dir():

        def read(name: str) -> str | None:
            path = vllm / name
            return path.read_text(encoding="utf-8") if path.exists() else None

        return read
    archive = zipfile.ZipFile(vllm)
    members = set(archive.namelist())

    def read_member(name: str) -> str | None:
        member = f"vllm/{name}"
        return archive.read(member).decode() if member in members else None

    return read_member


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vllm", type=Path, help="wheel, or package folder")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON to write")
    arguments = parser.parse_args()
    problems = contract_problems(find_names(arguments.vllm))
    if arguments.record:
        text = json.dumps(record(arguments.vllm), indent=1)
        arguments.record.write_text(text + "\n", encoding="utf-8")
    count = sum(map(len, CONTRACT.values()))
    print("\n".join(problems) or f"{arguments.vllm.name}: all {count} names are as expected")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
