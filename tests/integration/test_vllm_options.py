"""The table of engine options, against the vLLM that is installed; and what becomes of options in vLLM's hands."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.config import ConfigError
from services.common.cpu_cache import free_memory
from services.common.vllm_options import OPTIONS, VERSION
from services.inference.vllm_environment import prepare_environment, vllm_version
from tests.support.demo_model import demo_model
from tests.support.engine_process import worker_settings
from tests.support.vllm_options import installed_options

pytestmark = [
    # It takes no long time where vLLM is imported already.
    pytest.mark.vllm,
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """vLLM reads and changes it."""
    kept = dict(os.environ)
    prepare_environment(worker_settings(str(demo_model())))
    yield
    os.environ.clear()
    os.environ.update(kept)


def config(model: Path | None = None, **arguments: Any) -> Any:
    from services.inference.vllm_start import _vllm_config  # noqa: PLC0415  # once the environment is prepared

    path = str(model or demo_model())
    return _vllm_config(worker_settings(path, engine_args=arguments), path, cuda=False)


def test_the_table_is_what_the_installed_vllm_takes() -> None:
    assert vllm_version().startswith(f"{VERSION}.")
    assert {name: " | ".join(spec) for name, spec in OPTIONS.items()} == installed_options()


def test_options_of_every_kind_reach_vllm() -> None:
    made = config(
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        max_num_batched_tokens=512,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 20,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
        },
        structured_outputs_config={"backend": "guidance"},
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
        cpu_offload_params=["weight"],
        max_logprobs=5,
    )
    assert made.cache_config.enable_prefix_caching is False
    assert made.cache_config.kv_cache_memory_bytes == 1 << 20
    assert made.scheduler_config.enable_chunked_prefill is True
    assert made.scheduler_config.max_num_batched_tokens == 512
    assert (made.speculative_config.method, made.speculative_config.num_speculative_tokens) == ("ngram", 2)
    assert made.structured_outputs_config.backend == "guidance"
    assert made.kv_events_config.publisher == "null"
    assert (made.model_config.max_model_len, made.model_config.max_logprobs) == (256, 5)
    # What is ours stays so.
    assert made.scheduler_config.policy == "priority"


def test_on_a_cpu_the_kv_cache_holds_the_models_context_or_requests_are_as_long_as_it_holds(tmp_path: Path) -> None:
    """A model of 28 layers with 8 heads of 128 takes 112 KiB a token, as Qwen3-0.6B does."""
    free = free_memory()
    shape = {"num_hidden_layers": 28, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    each = 28 * 8 * 128 * 2 * 2

    def of(context: int, **arguments: Any) -> Any:
        made = json.loads((demo_model() / "config.json").read_text())
        path = tmp_path / str(context)
        shutil.copytree(demo_model(), path, dirs_exist_ok=True)
        (path / "config.json").write_text(
            json.dumps({**made, **shape, "max_position_embeddings": context, "dtype": "bfloat16"})
        )
        return config(path, **arguments)

    small = of(256)
    assert small.cache_config.kv_cache_memory_bytes == 64 << 20
    whole = of(4096)
    assert 4096 * each < whole.cache_config.kv_cache_memory_bytes < 4096 * each * 1.03
    cut = of(1 << 20)
    assert cut.model_config.original_max_model_len == -1
    assert cut.cache_config.kv_cache_memory_bytes <= min(4 << 30, free * 0.3)
    assert of(1 << 20, kv_cache_memory_bytes=1 << 20).cache_config.kv_cache_memory_bytes == 1 << 20
    asked = of(1 << 20, max_model_len=8192)
    assert asked.model_config.original_max_model_len == 8192
    assert asked.cache_config.kv_cache_memory_bytes > 8192 * each
    with pytest.raises(ConfigError, match=r"engine_args\.max_model_len: a request of 1048576 tokens needs a KV cache"):
        of(1 << 20, max_model_len=1 << 20)


def test_parallel_engines_are_configured_as_asked() -> None:
    made = config(tensor_parallel_size=2, distributed_executor_backend="mp")
    assert made.parallel_config.world_size == 2
    assert made.parallel_config.distributed_executor_backend == "mp"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kv_events_config": {"publisher": "pigeon"}}, "engine_args.kv_events_config"),
        ({"speculative_config": {"method": "guessing"}}, "guessing"),
        ({"max_model_len": 1_000_000}, "1000000"),
    ],
)
def test_what_only_vllm_can_refuse_is_refused_with_its_words(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**arguments)
    assert said in str(caught.value)


def test_a_vllm_for_gpus_that_finds_none_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms  # noqa: PLC0415  # once the environment is prepared

    monkeypatch.setattr(platforms, "current_platform", platforms.interface.UnspecifiedPlatform())
    with pytest.raises(ConfigError, match='engine: "vllm" is installed for GPUs, and finds none here'):
        config()
