"""What may be written as engine_args, checked without vLLM."""

import subprocess
import sys
from typing import Any

import pytest

from services.common.config import ConfigError
from services.common.engine_args import check_engine_args, parallel_size

GOOD: list[dict[str, Any]] = [
    {},
    {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    {"quantization": None, "enable_prefix_caching": False, "enable_chunked_prefill": True},
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"},
    {"cpu_offload_gb": 4, "swa_bounded_replay": False, "max_lora_rank": 16, "optimization_level": 0},
    {"max_model_len": -1, "attention_backend": "TRITON_ATTN", "mamba_ssu_algorithm": None},
    {"load_format": "a_plugins_own", "cpu_offload_params": ["weight"]},
]

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_num_seq": 4}, ["args.max_num_seq:", "no such argument", "did you mean max_num_seqs?"]),
    ({"zzz": 4}, ["args.zzz:", "no such argument"]),
    ({"max_num_seqs": "4"}, ["args.max_num_seqs:", "expected null or int", "'4'"]),
    ({"max_num_seqs": True}, ["args.max_num_seqs:", "True"]),
    ({"max_num_seqs": 0}, ["args.max_num_seqs:", "at least 1", "0"]),
    ({"tensor_parallel_size": 0}, ["args.tensor_parallel_size:", "at least 1"]),
    ({"enforce_eager": 1}, ["args.enforce_eager:", "expected bool"]),
    ({"kv_cache_dtype": "fp9"}, ["args.kv_cache_dtype:", "'fp8_e4m3'", "'fp9'", "did you mean"]),
    ({"quantization": "awqq"}, ["args.quantization:", "'awq'", "did you mean 'awq'?"]),
    ({"dtype": "float8"}, ["args.dtype:", "'bfloat16'"]),
    ({"max_lora_rank": 7}, ["args.max_lora_rank:", "8, 16"]),
    ({"distributed_executor_backend": "dask"}, ["args.distributed_executor_backend:", "'ray'"]),
    ({"speculative_config": "ngram"}, ["args.speculative_config:", "expected null or dict"]),
    ({"model": "x"}, ["args.model:", "models[].path"]),
    ({"served_model_name": "x"}, ["args.served_model_name:", "models[].name"]),
    ({"gpu_memory_utilization": 0.9}, ["args.gpu_memory_utilization:", "worker's own"]),
    ({"otlp_traces_endpoint": "x"}, ["args.otlp_traces_endpoint:", "otlp_endpoint"]),
    ({"disable_log_stats": True}, ["args.disable_log_stats:", "load reports"]),
    ({"scheduling_policy": "fcfs"}, ["args.scheduling_policy:", "priorit"]),
    ({"data_parallel_size": 2}, ["args.data_parallel_size:", "more workers"]),
]


@pytest.mark.parametrize("arguments", GOOD)
def test_what_vllm_takes_is_taken(arguments: dict[str, Any]) -> None:
    check_engine_args(arguments, "args")


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_what_vllm_would_not_take_is_refused_by_its_key_with_what_it_may_be(
    arguments: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_args(arguments, "args")
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_an_engine_takes_as_many_gpus_as_its_parallel_sizes_multiply_to() -> None:
    assert parallel_size({}) == 1
    assert parallel_size({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}) == 6


def test_checking_needs_neither_vllm_nor_torch() -> None:
    code = "import sys, services.mesh.config; assert not {'vllm', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
