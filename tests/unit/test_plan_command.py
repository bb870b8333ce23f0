"""The arithmetic of `tokenloom plan`, against what is known of public models and of a checkpoint made here."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from services.common.config import ConfigError
from services.common.kv_cache import kv_cache
from services.mesh.__main__ import main
from services.mesh.checkpoint import read_checkpoint
from services.mesh.fit import fit, parse_memory
from tests.support.nvml.stub import L40, RTX_4090, NvmlStub

GIB = 1 << 30
LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "sliding_window": None,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
GEMMA_3_27B = {
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
GPT_OSS_20B = {
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
QWEN3_NEXT = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
}
JAMBA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
}

# Bytes a token with 16-bit values: in layers that keep everything, and in those that keep a window.
KNOWN: list[tuple[str, dict[str, Any], int, int]] = [
    ("Llama-3-8B", LLAMA_3_8B, 131_072, 0),
    ("Qwen2.5-7B", QWEN_25_7B, 57_344, 0),
    ("Mixtral-8x7B", MIXTRAL_8X7B, 131_072, 0),
    ("DeepSeek-V3", DEEPSEEK_V3, 70_272, 0),
    ("gemma-3-27b", GEMMA_3_27B, 81_920, 425_984),
    ("gpt-oss-20b", GPT_OSS_20B, 24_576, 24_576),
    ("Qwen3-Next-80B", QWEN3_NEXT, 24_576, 0),
    ("Jamba-v0.1", JAMBA, 16_384, 0),
]


def cache(config: dict[str, Any], *, dtype_bytes: float = 2, tensor: int = 1, pipeline: int = 1) -> Any:
    return kv_cache(config, dtype_bytes=dtype_bytes, tensor_parallel=tensor, pipeline_parallel=pipeline)


@pytest.mark.parametrize(("name", "config", "full", "sliding"), KNOWN, ids=[name for name, *_ in KNOWN])
def test_the_kv_cache_of_well_known_models(name: str, config: dict[str, Any], full: int, sliding: int) -> None:
    del name
    found = cache(config)
    assert (found.full_bytes, found.sliding_bytes) == (full, sliding)
    assert cache(config, dtype_bytes=1).bytes_per_token == (full + sliding) / 2


def test_gpus_share_heads_and_layers_but_not_a_latent_vector() -> None:
    assert cache(LLAMA_3_8B, tensor=2).full_bytes == 65_536
    assert cache(LLAMA_3_8B, tensor=16).full_bytes == 16_384
    assert cache(LLAMA_3_8B, pipeline=2).full_bytes == 65_536
    assert cache(DEEPSEEK_V3, tensor=8).full_bytes == 70_272


def test_windows_bound_what_a_long_sequence_takes() -> None:
    found = cache(GEMMA_3_27B)
    assert found.sequence_bytes(100) == 100 * (81_920 + 425_984)
    assert found.sequence_bytes(10_000) == 10_000 * 81_920 + 1024 * 425_984


def folder(path: Path, config: dict[str, Any], tensors: dict[str, tuple[str, list[int], int]] | None = None) -> Path:
    """A model's folder; tensors by name: their type, shape and bytes. Their values are a hole in the file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        header, at = {}, 0
        for name, (kind, shape, size) in tensors.items():
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_weights_are_read_off_the_files_and_cast_to_what_the_model_runs_in(tmp_path: Path) -> None:
    tensors = {"a": ("F32", [1000, 10], 40_000), "b": ("BF16", [500], 1000)}
    checkpoint = read_checkpoint(str(folder(tmp_path, LLAMA_3_8B, tensors)))
    assert checkpoint.parameters == 10_500
    assert checkpoint.weight_bytes(2.0)[0] == 21_000
    assert checkpoint.weight_bytes(4.0)[0] == 42_000


def test_quantised_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    config = {**LLAMA_3_8B, "quantization_config": {"quant_method": "awq", "bits": 4}}
    tensors = {"qweight": ("I32", [1000, 10], 40_000), "scales": ("F16", [100], 200)}
    checkpoint = read_checkpoint(str(folder(tmp_path, config, tensors)))
    weights, known_by = checkpoint.weight_bytes(2.0)
    assert weights == 40_200
    assert "awq" in known_by


@pytest.mark.parametrize(("config", "billions"), [(LLAMA_3_8B, 8.03), (QWEN_25_7B, 7.61), (MIXTRAL_8X7B, 46.7)])
def test_without_files_the_weights_are_estimated_with_a_fifth_on_top(
    tmp_path: Path, config: dict[str, Any], billions: float
) -> None:
    checkpoint = read_checkpoint(str(folder(tmp_path, config)))
    assert checkpoint.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    weights, known_by = checkpoint.weight_bytes(2.0)
    assert weights == pytest.approx(checkpoint.parameters * 2.4)
    assert "estimated" in known_by


def test_the_sum_adds_up(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(folder(tmp_path, LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)})))
    found = fit(checkpoint, gpu_bytes=24 * GIB, share=0.8, arguments={})
    assert found.weight_bytes + found.overhead_bytes + found.cache_bytes == pytest.approx(0.8 * 24 * GIB)
    assert found.cache_tokens == int(found.cache_bytes // 131_072)
    assert found.at_max_len == found.cache_tokens // 8192
    assert found.fits
    two = fit(checkpoint, gpu_bytes=24 * GIB, share=0.8, arguments={"tensor_parallel_size": 2})
    assert two.weight_bytes == 8 * 10**9
    assert two.cache_tokens > 4 * found.cache_tokens
    halved = fit(checkpoint, gpu_bytes=24 * GIB, share=0.8, arguments={"kv_cache_dtype": "fp8"})
    assert halved.cache_tokens == pytest.approx(2 * found.cache_tokens, abs=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24G", 24 * GIB), ("24GB", 24 * 10**9), ("512 MiB", GIB // 2), ("7", 7 * GIB)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "24 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_memory(text)


def test_the_command_says_in_words_and_by_its_exit_code_whether_a_model_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder(tmp_path, LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)}))
    assert main(["plan", "--model", model, "--gpu-memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "8.00 billion parameters" in said
    assert "128.0 KiB a token" in said
    assert "it fits" in said
    assert main(["plan", "--model", model, "--gpu-memory", "16GiB"]) == 1
    assert "it does not fit: weights and allowance are" in capsys.readouterr().out
    assert main(["plan", "--model", model, "--gpu-memory", "24GiB", "--max-model-len", "200000"]) == 1
    assert "with max_model_len" in capsys.readouterr().out
    assert main(["plan", "--model", model, "--gpu-memory", "24GiB", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["models"]
    assert answer["fits"] is True
    assert answer["kv_cache_bytes_per_token"] == 131_072


def test_the_command_checks_a_mesh_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "big", LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)})
    config = tmp_path / "mesh.yaml"
    text = (
        "models: [{name: big, path: ./big}]\n"
        "pools: [{name: p, serves: [big], workers: [{name: w, gpu: 0, engine_args: {max_model_len: 4096}}]}]\n"
    )
    config.write_text(text)
    assert main(["plan", "--config", str(config)]) == 3
    said = capsys.readouterr().out
    assert "mesh.yaml has no mistakes in its keys; whether 1 of its 1 vLLM workers fit is not known" in said
    assert "--gpu-memory" in said
    assert main(["plan", "--config", str(config), "--gpu-memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "mesh.yaml is right" in said
    assert "of 4,096 tokens" in said
    assert main(["plan", "--config", str(config), "--gpu-memory", "12GiB"]) == 1
    capsys.readouterr()
    config.write_text(text.replace("max_model_len", "max_model_length"))
    assert main(["plan", "--config", str(config)]) == 2
    assert "did you mean max_model_len?" in capsys.readouterr().err


def test_each_worker_of_an_unequal_fleet_is_held_against_its_own_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "big", LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)})
    config = tmp_path / "mesh.yaml"
    workers = "{name: a, gpu: 0}, {name: b, gpu: '1,2', engine_args: {tensor_parallel_size: 2}}, {name: c, gpu: 2}"
    config.write_text(
        f"models: [{{name: big, path: ./big}}]\npools: [{{name: p, serves: [big], workers: [{workers}]}}]\n".replace(
            "{name: c, gpu: 2}", "{name: c, gpu: 3}"
        )
    )
    command = ["plan", "--config", str(config), "--json", "--gpu-memory"]
    assert main([*command, "45,45,24,12"]) == 1
    answers = json.loads(capsys.readouterr().out)["models"]
    assert [answer["memory_bytes"] // GIB for answer in answers] == [45, 24, 12]
    assert [answer["fits"] for answer in answers] == [True, True, False]
    assert main([*command, "45,45,24"]) == 2
    assert "--gpu-memory: has 3 sizes, and none for gpu 3" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "big"), "--gpu-memory", "45,45,12"]) == 1
    said = capsys.readouterr().out
    assert (said.count("it fits"), said.count("it does not fit")) == (1, 1)


def test_the_cards_of_this_machine_need_not_be_told(tmp_path: Path) -> None:
    folder(tmp_path / "big", LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)})
    lost = {**{name: getattr(L40, name) for name in L40.__dataclass_fields__}, "uuid": "GPU-lost", "error": 15}
    stub = NvmlStub(tmp_path)
    stub.show([L40, RTX_4090, type(L40)(**lost)])
    config = tmp_path / "mesh.yaml"
    workers = "{name: a, gpu: GPU-l40}, {name: b, gpu: 1}, {name: c, gpu: 2}"
    config.write_text(
        f"models: [{{name: big, path: ./big}}]\npools: [{{name: p, serves: [big], workers: [{workers}]}}]\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "services.mesh", "plan", "--config", str(config), "--json"],
        env=stub.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    answers = json.loads(ran.stdout)["models"]
    assert [answer.get("memory_bytes", 0) // GIB for answer in answers] == [45, 24, 0]
    assert [answer["fits"] for answer in answers] == [True, True, None]
    assert ran.returncode == 3


def test_a_machine_without_cards_is_held_against_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder(tmp_path, LLAMA_3_8B, {"w": ("BF16", [25 * 10**7], 5 * 10**8)}))
    command = ["plan", "--model", model, "--json", "--cpu-memory"]
    assert main([*command, "32GiB"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["models"]
    assert (answer["device"], answer["max_model_len"]) == ("cpu", 8192)
    # All of the context, which takes 1 GiB, and not more.
    assert GIB < answer["kv_cache_bytes_per_gpu"] < 1.02 * GIB
    assert main([*command, "3500MiB"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["models"]
    # A quarter of what is free holds 218 blocks of 32 tokens, one of which vLLM keeps.
    assert answer["max_model_len"] == 217 * 32
    assert main([*command, "2GiB"]) == 1
    capsys.readouterr()
    assert main([*command, "4GiB", "--max-model-len", "60000"]) == 2
    assert (
        "engine_args.max_model_len: a request of 60000 tokens needs a KV cache of 7.33 GiB" in capsys.readouterr().err
    )


def test_a_model_is_planned_by_its_size_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--parameters", "8B", "--gpu-memory"]
    assert main([*command, "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "weights      17.88 GiB on one GPU (estimated: 8.00 billion parameters of 2 bytes, times 1.2)" in said
    assert "the weights fit, and leave 0.32 GiB; for how many requests that is, is not known" in said
    assert main([*command, "20GiB"]) == 1
    capsys.readouterr()
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128", "--max-model-len", "4096", "--json"]
    assert main([*command, "48GiB", *shape]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["models"]
    assert answer["kv_cache_bytes_per_token"] == 131_072
    assert answer["max_model_len"] == 4096


class _Hub(BaseHTTPRequestHandler):
    """The Hugging Face Hub as far as files go: each has its size, its hash, and can be read in parts."""

    folder: Path
    read: ClassVar[list[str]] = []

    def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.folder / self.path.rpartition("/resolve/main/")[2]
        if not self.path.startswith("/org/model/resolve/main/") or not path.is_file():
            self.send_response(404)
            self.send_header("x-error-code", "EntryNotFound" if "/org/model/" in self.path else "RepoNotFound")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        content, asked = path.read_bytes(), self.headers.get("range", "")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", '"1"')
        self.send_header("x-repo-commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.read.append(f"{path.name} {len(content)}")
            self.wfile.write(content)


def test_a_model_of_the_hub_is_planned_by_its_headers_without_a_download(tmp_path: Path) -> None:
    """In a process of its own: the library reads the environment once."""
    pytest.importorskip("huggingface_hub")
    _Hub.folder = folder(tmp_path / "hub", LLAMA_3_8B, {"w": ("BF16", [8 * 10**9], 16 * 10**9)})
    with (_Hub.folder / "model.safetensors").open("ab") as weights:
        weights.truncate(64 << 20)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}

    def plan(model: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "services.mesh", "plan", "--model", model, "--gpu-memory", "24GiB"]
        return subprocess.run(
            command, env={**os.environ, **hub}, capture_output=True, text=True, timeout=60, check=False
        )

    try:
        known = plan("org/model")
    finally:
        server.shutdown()
        server.server_close()
    assert known.returncode == 0, known.stderr
    assert "8.00 billion parameters" in known.stdout
    assert "of the checkpoint's files" in known.stdout
    assert max(int(entry.split()[1]) for entry in _Hub.read) <= 100_001
    away = plan("org/elsewhere")
    assert away.returncode == 2
    assert "no download of that name: 'org/elsewhere', and the Hugging Face Hub can't be asked" in away.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parameters", "many"], "--parameters"),
        (["--parameters", "8B", "--layers", "32"], "--kv-heads"),
        (["--parameters", "8B", "--cpu-memory", "much"], "--cpu-memory"),
        (["--model", "{model}", "--layers", "32"], "--layers: goes with --parameters"),
        ([], "--model"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "{model}", "--gpu-memory", "lots"], "--gpu-memory"),
        (["--model", "{model}", "--gpu-memory-utilization", "2"], "--gpu-memory-utilization"),
        (["--model", "{model}", "--tensor-parallel-size", "0"], "tensor_parallel_size"),
        (["--model", "{model}", "--kv-cache-dtype", "fp9"], "did you mean"),
        (["--model", "{model}", "--config", "x"], "either"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    model = str(folder(tmp_path, LLAMA_3_8B))
    assert main(["plan", *(argument.format(model=model) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", (100_000).to_bytes(8, "little") + b"[" * 100_000]
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = folder(tmp_path, LLAMA_3_8B)
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        read_checkpoint(str(path))
