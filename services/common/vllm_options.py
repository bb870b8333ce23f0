"""The options of vLLM's engine in the version that this mesh is made for, with what each may be.

One line an option, alternatives between bars: types, and values in quotes or as numbers. Kept equal to vLLM's
AsyncEngineArgs by a test; `python -m tests.support.vllm_options` prints it anew.
"""

from typing import Final

__all__ = ["OPTIONS", "VERSION"]

VERSION: Final = "0.32"

_TABLE: Final = """
additional_config: dict
aggregate_engine_logging: bool
all2all_backend: 'naive' | 'pplx' | 'deepep_high_throughput' | 'deepep_low_latency' | 'deepep_v2' |
    'mori_high_throughput' | 'mori_low_latency' | 'moonep' | 'nixl_ep' | 'allgather_reducescatter' |
    'flashinfer_all2allv' | 'flashinfer_nvlink_two_sided' | 'flashinfer_nvlink_one_sided' | 'passthrough'
allow_deprecated_quantization: bool
allowed_local_media_path: str
allowed_media_domains: null | list
async_scheduling: null | bool
attention_backend: 'FLASH_ATTN' | 'FLASH_ATTN_DIFFKV' | 'TRITON_ATTN' | 'TRITON_ATTN_DIFFKV' | 'TRITON_FLASH_ATTN' |
    'ROCM_ATTN' | 'ROCM_SEGMENTED_ATTN' | 'ROCM_AITER_MLA' | 'ROCM_AITER_TRITON_MLA' | 'ROCM_AITER_FA' |
    'ROCM_AITER_MLA_SPARSE' | 'XPU_MLA_SPARSE' | 'TORCH_SDPA' | 'FLASHINFER' | 'TRITON_FLASHINFER' | 'FLASHINFER_MLA'
    | 'TOKENSPEED_MLA' | 'FLASHINFER_MLA_SPARSE' | 'FLASHINFER_MLA_SPARSE_SM120' | 'FLASHINFER_MLA_SPARSE_SM90' |
    'TRITON_MLA' | 'CUTLASS_MLA' | 'FLASHMLA' | 'FLASHMLA_SPARSE' | 'FLASHMLA_SPARSE_DSV4' |
    'FLASHINFER_MLA_SPARSE_DSV4' | 'ROCM_FLASHMLA_SPARSE_DSV4' | 'FLASHMLA_SPARSE_DSV41' |
    'FLASHINFER_MLA_SPARSE_DSV41' | 'FLASHMLA_MEGA_ATTN_DSV41' | 'B12X' | 'FLASH_ATTN_MLA' | 'FLASH_ATTN_MLA_SPARSE' |
    'MINIMAX_M3_SPARSE' | 'CUTLASS_MSA' | 'TRITON_MSA' | 'NO_ATTENTION' | 'FLEX_ATTENTION' | 'HPC_ATTN' |
    'ROCM_AITER_UNIFIED_ATTN' | 'CPU_ATTN' | 'CPU_MLA' | 'AMX_MLA' | 'TURBOQUANT' | 'ULTRAQUANT' | 'CUSTOM' | null
attention_config: dict
aux_output_config: dict
block_size: null | int
code_revision: null | str
collect_detailed_traces: null | list
compilation_config: dict
config_format: str
convert: 'auto' | 'none' | 'embed' | 'classify'
cp_kv_cache_interleave_size: null | int
cpu_distributed_timeout_seconds: null | int
cpu_offload_gb: float
cpu_offload_params: list
cudagraph_capture_sizes: null | list
cudagraph_metrics: bool
custom_histogram_buckets: null | dict
data_parallel_address: null | str
data_parallel_backend: 'ray' | 'mp'
data_parallel_external_lb: bool
data_parallel_hybrid_lb: bool
data_parallel_multi_port_external_lb: bool
data_parallel_rank: null | int
data_parallel_rpc_port: null | int
data_parallel_size: int
data_parallel_size_local: null | int
data_parallel_start_rank: null | int
dbo_decode_token_threshold: int
dbo_prefill_token_threshold: int
dcp_comm_backend: 'ag_rs' | 'a2a' | null
dcp_kv_cache_interleave_size: int
dcp_q_replicate: null | bool
decode_context_parallel_size: int
default_mm_loras: null | dict
device_ids: null | list
diffusion_config: null | dict
disable_cascade_attn: null | bool
disable_chunked_mm_input: bool
disable_custom_all_reduce: bool
disable_hybrid_kv_cache_manager: null | bool
disable_log_stats: bool
disable_nccl_for_dp_synchronization: null | bool
disable_sliding_window: bool
distributed_executor_backend: 'ray' | 'mp' | 'uni' | 'external_launcher' | null | str
distributed_timeout_seconds: null | int
download_dir: null | str
dp_sync_interval: int
dtype: 'auto' | 'half' | 'float16' | 'bfloat16' | 'float' | 'float32'
ec_manager_config: dict
ec_transfer_config: null | dict
elastic_ep_max_dp_size: int
enable_batch_sharded_sampling: null | bool
enable_chunked_prefill: null | bool
enable_cumem_allocator: bool
enable_dbo: bool
enable_elastic_ep: bool
enable_ep_weight_filter: bool
enable_eplb: bool
enable_expert_parallel: bool
enable_fault_tolerance: bool
enable_flashinfer_autotune: bool
enable_hc_sp: bool
enable_layerwise_nvtx_tracing: bool
enable_log_requests: bool
enable_logging_iteration_details: bool
enable_lora: bool
enable_mamba_cache_stochastic_rounding: bool
enable_mamba_shared_prefix_checkpoint: bool
enable_mfu_metrics: bool
enable_mixed_moe_lora_format: bool
enable_mm_embeds: bool
enable_mm_processor_stats: bool
enable_moe_shared_loras: bool
enable_nccl_comm_suspend: bool
enable_prefix_caching: null | bool
enable_prompt_embeds: bool
enable_return_routed_experts: bool
enable_shm_tensor_arena: bool
enable_sleep_mode: bool
enable_tower_connector_lora: bool
enable_trace_replay: bool
enforce_eager: bool
engram_config: null | dict
eplb_config: dict
expert_placement_strategy: 'linear' | 'round_robin'
fail_on_environ_validation: bool
fault_tolerance_config: dict
fully_sharded_loras: bool
gdn_prefill_backend: 'flashinfer' | 'triton' | 'cutedsl' | 'aiter_flydsl' | null
generation_config: str
gpu_memory_utilization: float
hf_config_path: null | str
hf_overrides: dict
hf_token: null | bool | str
ignore_patterns: list | str
interleave_mm_strings: bool
io_processor_plugin: null | str
ir_op_priority: dict
jit_monitor_mode: 'warn' | 'error'
jit_monitor_verbose: bool
kda_decode_backend: 'auto' | 'native' | 'flashinfer' | 'triton' | null
kda_prefill_backend: 'auto' | 'triton' | 'flashkda' | 'flashinfer' | 'fused' | null
kernel_config: dict
kv_cache_dtype: 'auto' | 'float16' | 'bfloat16' | 'fp8' | 'fp8_e4m3' | 'fp8_e5m2' | 'fp8_inc' | 'fp8_ds_mla' |
    'nvfp4_ds_mla' | 'turboquant_k8v4' | 'turboquant_4bit_nc' | 'turboquant_k3v4_nc' | 'turboquant_3bit_nc' |
    'ultraquant_4bit' | 'int4_per_token_head' | 'int8_per_token_head' | 'fp8_per_token_head' | 'nvfp4' |
    'nvfp4_4over6'
kv_cache_dtype_skip_layers: list
kv_cache_memory_bytes: null | int
kv_cache_metrics: bool
kv_cache_metrics_sample: float
kv_events_config: null | dict
kv_offloading_backend: 'native' | 'lmcache'
kv_offloading_size: null | float
kv_sharing_fast_prefill: bool
kv_transfer_config: null | dict
language_model_only: bool
limit_mm_per_prompt: dict
linear_backend: 'auto' | 'cutlass' | 'flashinfer_cutlass' | 'flashinfer_cutedsl' | 'flashinfer_trtllm' |
    'flashinfer_cudnn' | 'flashinfer_b12x' | 'b12x' | 'marlin' | 'humming' | 'triton' | 'deep_gemm' | 'torch' |
    'aiter' | 'machete' | 'fbgemm' | 'conch' | 'exllama' | 'emulation' | 'xpu' | 'xpu_woq'
load_format: 'auto' | 'hf' | 'dummy' | 'fastsafetensors' | 'instanttensor' | 'ipc_cache' | 'mistral' | 'modelexpress'
    | 'npcache' | 'pt' | 'runai_streamer' | 'runai_streamer_sharded' | 'safetensors' | 'sharded_state' | 'tensorizer'
    | str
log_config_file: null | str
log_level: 'CRITICAL' | 'ERROR' | 'WARNING' | 'INFO' | 'DEBUG' | 'NOTSET' | null
logging_config: null | dict
logits_processors: null | list
logprobs_mode: 'raw_logits' | 'raw_logprobs' | 'processed_logits' | 'processed_logprobs'
long_prefill_token_threshold: int
long_prefill_token_threshold_adaptive: bool
lora_dtype: null | str
lora_target_modules: null | list
mamba_backend: 'TRITON' | 'FLASHINFER' | 'CPU'
mamba_block_size: null | int
mamba_cache_dtype: 'auto' | 'float32' | 'float16' | 'bfloat16'
mamba_cache_mode: 'align' | 'none'
mamba_cache_philox_rounds: int
mamba_config: dict
mamba_ssm_cache_dtype: 'auto' | 'float32' | 'float16' | 'bfloat16'
mamba_ssu_algorithm: 'auto' | 'simple' | 'vertical' | 'horizontal' | null
master_addr: str
master_port: int
max_cpu_loras: null | int
max_cudagraph_capture_size: null | int
max_logprobs: int
max_lora_cls_labels: null | int
max_lora_rank: 1 | 8 | 16 | 32 | 64 | 128 | 256 | 320 | 512
max_loras: int
max_model_len: int
max_num_active_seqs: null | int
max_num_batched_tokens: null | int
max_num_queued_reqs: null | int
max_num_queued_tokens: null | int
max_num_scheduled_tokens: null | int
max_num_seqs: null | int
max_parallel_loading_workers: null | int
media_io_kwargs: dict
mm_device_do_normalize: null | bool
mm_encoder_attn_backend: 'FLASH_ATTN' | 'FLASH_ATTN_DIFFKV' | 'TRITON_ATTN' | 'TRITON_ATTN_DIFFKV' |
    'TRITON_FLASH_ATTN' | 'ROCM_ATTN' | 'ROCM_SEGMENTED_ATTN' | 'ROCM_AITER_MLA' | 'ROCM_AITER_TRITON_MLA' |
    'ROCM_AITER_FA' | 'ROCM_AITER_MLA_SPARSE' | 'XPU_MLA_SPARSE' | 'TORCH_SDPA' | 'FLASHINFER' | 'TRITON_FLASHINFER' |
    'FLASHINFER_MLA' | 'TOKENSPEED_MLA' | 'FLASHINFER_MLA_SPARSE' | 'FLASHINFER_MLA_SPARSE_SM120' |
    'FLASHINFER_MLA_SPARSE_SM90' | 'TRITON_MLA' | 'CUTLASS_MLA' | 'FLASHMLA' | 'FLASHMLA_SPARSE' |
    'FLASHMLA_SPARSE_DSV4' | 'FLASHINFER_MLA_SPARSE_DSV4' | 'ROCM_FLASHMLA_SPARSE_DSV4' | 'FLASHMLA_SPARSE_DSV41' |
    'FLASHINFER_MLA_SPARSE_DSV41' | 'FLASHMLA_MEGA_ATTN_DSV41' | 'B12X' | 'FLASH_ATTN_MLA' | 'FLASH_ATTN_MLA_SPARSE' |
    'MINIMAX_M3_SPARSE' | 'CUTLASS_MSA' | 'TRITON_MSA' | 'NO_ATTENTION' | 'FLEX_ATTENTION' | 'HPC_ATTN' |
    'ROCM_AITER_UNIFIED_ATTN' | 'CPU_ATTN' | 'CPU_MLA' | 'AMX_MLA' | 'TURBOQUANT' | 'ULTRAQUANT' | 'CUSTOM' | null |
    str
mm_encoder_attn_dtype: null | str
mm_encoder_fp8_scale_path: null | str
mm_encoder_fp8_scale_save_margin: float
mm_encoder_fp8_scale_save_path: null | str
mm_encoder_only: bool
mm_encoder_tp_mode: 'weights' | 'data'
mm_hasher_algorithm: 'blake3' | 'sha256' | 'sha512'
mm_ipc_gpu_memory_gb: float
mm_processor_cache_gb: float
mm_processor_cache_type: 'shm' | 'lru' | null
mm_processor_device: str
mm_processor_kwargs: null | dict
mm_shm_cache_max_object_size_mb: int
mm_tensor_ipc: 'direct_rpc' | 'torch_shm'
model: str
model_class_overrides: dict
model_impl: str
model_loader_extra_config: dict
model_weights: str
moe_backend: 'auto' | 'triton' | 'batched_triton' | 'deep_gemm' | 'deep_gemm_mega_moe' | 'cutlass' |
    'flashinfer_trtllm' | 'flashinfer_cutlass' | 'flashinfer_cutedsl' | 'flashinfer_moe_ep_cutedsl' |
    'flashinfer_b12x' | 'b12x' | 'flashinfer_moe_ep_mega_deep_gemm' | 'marlin' | 'humming' | 'triton_unfused' |
    'aiter' | 'aiter_mega_moe' | 'aiter_triton_mxfp4_bf16' | 'flydsl' | 'hpc' | 'emulation' | 'rdna3'
nnodes: int
node_rank: int
num_gpu_blocks_override: null | int
numa_bind: bool
numa_bind_cpus: null | list
numa_bind_nodes: null | list
offload_backend: str
offload_group_size: int
offload_num_in_group: int
offload_params: list
offload_prefetch_step: int
optimization_level: 0 | 1 | 2 | 3
otlp_traces_endpoint: null | str
override_generation_config: dict
per_request_spec_decode_metrics: 'none' | 'summary' | 'detailed'
performance_mode: 'balanced' | 'interactivity' | 'throughput'
pipeline_parallel_size: int
pooler_config: null | dict
prefill_context_parallel_size: int
prefill_schedule_interval: int
prefix_cache_retention_interval: null | int
prefix_caching_hash_algo: 'sha256' | 'sha256_cbor' | 'xxhash' | 'xxhash_cbor'
prefix_match_unit: null | int
profiler_config: dict
pt_load_map_location: dict | str
quantization: 'awq' | 'auto_awq' | 'fp8' | 'fbgemm_fp8' | 'fp_quant' | 'modelopt' | 'modelopt_fp4' | 'modelopt_mxfp8'
    | 'modelopt_mixed' | 'auto_gptq' | 'gptq' | 'gptq_marlin' | 'awq_marlin' | 'humming' | 'compressed-tensors' |
    'experts_int8' | 'quark' | 'moe_wna16' | 'torchao' | 'inc' | 'mxfp4' | 'gpt_oss_mxfp4' | 'deepseek_v4_fp8' |
    'online' | 'fp8_per_tensor' | 'fp8_per_block' | 'fp8_per_channel' | 'int8_per_channel_weight_only' |
    'nvfp4_per_token' | 'mxfp8' | null | str
quantization_config: null | dict
ray_workers_use_nsight: bool
reasoning_config: dict
reasoning_parser: str
reasoning_parser_plugin: null | str
renderer_num_workers: int
replayssm_buffer_len: int
return_sampling_mask: bool
revision: null | str
runner: 'auto' | 'generate' | 'pooling' | 'draft'
safetensors_load_strategy: 'lazy' | 'eager' | 'prefetch' | 'torchao' | null
safetensors_prefetch_block_size: int
safetensors_prefetch_num_threads: int
scheduler_cls: null | str
scheduler_reserve_full_isl: bool
scheduling_policy: 'fcfs' | 'priority'
seed: int
served_model_name: null | list | str
show_hidden_metrics_for_version: null | str
shutdown_timeout: int
skip_mm_profiling: bool
skip_tokenizer_init: bool
sleep_mode_offload_cudagraph: bool
sleep_preserve_parameter_names: list
sparse_indexer_topk_backend: 'auto' | 'deep_select' | 'cooperative' | 'persistent' | 'per_row' | 'flashinfer' |
    'torch' | 'aiter'
spec_method: null | str
spec_model: null | str
spec_tokens: null | int
specialize_active_lora: bool
speculative_config: null | dict
stream_interval: int
structured_outputs_config: dict
swa_bounded_replay: bool
tensor_parallel_size: int
tokenizer: null | str
tokenizer_mode: 'auto' | 'hf' | 'mistral' | 'deepseek_v32' | 'deepseek_v4' | 'inkling' | 'kimi_k3' | 'cohere' | str
tokenizer_revision: null | str
tokens_only: bool
trust_remote_code: bool
ubatch_size: int
use_fp64_gumbel: bool
use_replayssm: bool
use_tqdm_on_load: bool
video_pruning_method: str
video_pruning_rate: null | float
watermark: float
watermark_config: null | dict
weight_transfer_config: null | dict
worker_cls: str
worker_extension_cls: str
"""

OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(" ".join(spec.split()).split(" | "))
    for name, _, spec in (line.partition(": ") for line in _TABLE.strip().replace("\n    ", " ").splitlines())
}
