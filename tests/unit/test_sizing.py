"""The arithmetic of `foundry size` against what was measured: the figures are read from benchmarks/results, so that new
ones are compared too. Within 15 %, where a test does not say otherwise."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import InvalidArgument, ModelNotFound, ModelUnsupported
from foundry.sizing import ENGINES, GPUS, MICRO_BATCH_TOKENS, MODELS, WORKSPACE_BYTES, Sizing, find_model

TOLERANCE = 0.15
LLAMA_3B = MODELS["llama-3.2-3b"]
VLLM = Sizing(model=LLAMA_3B, gpu=GPUS["h100-80"], engine=ENGINES["vllm"])
# The measured model of the built-in engine has embeddings of its own.
TORCH = Sizing(
    model=replace(LLAMA_3B, tied_embeddings=False),
    gpu=GPUS["h200"],
    engine=ENGINES["torch"],
    document_tokens=6144,
    answer_tokens=1024,
)


def results(name: str) -> Any:
    return json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / name).read_text())


def near(measured: float, tolerance: float = TOLERANCE) -> Any:
    return pytest.approx(measured, rel=tolerance)


def test_decoding_by_vllm() -> None:
    """128 prompt and 512 new tokens, every case and round."""
    rows = [row for row in results("gpu_vllm.json")["speed"] if row["case"] != "vLLM alone"]
    assert len({(row["batch"], row["case"]) for row in rows}) == 6
    for row in rows:
        cartridges = {"no cartridge": 0, "one shared": 1, "8 distinct": 8}[row["case"]]
        sizing = replace(VLLM, answer_tokens=512, cartridge_tokens=2048 if cartridges else 0)
        seconds, _ = sizing.decode_step(row["batch"], cartridges)
        assert row["batch"] / seconds == near(row["decode_tokens_per_second"]), row


@pytest.mark.parametrize("batch", [32, 256])
def test_first_tokens_by_vllm(batch: int) -> None:
    """A batch of prompts of 128 tokens, of which nothing is cached: their prefill, and a step."""
    measured = results("gpu_vllm.json")["first_tokens_of_a_batch_ms"][f"{batch}, anew"]
    seconds = VLLM.prefill_seconds(batch) + replace(VLLM, answer_tokens=0).decode_step(batch, 1)[0]
    assert seconds * 1e3 == near(statistics.median(measured))


def test_decoding_by_the_built_in_engine() -> None:
    """Within 16 %: 128 prompt and 512 new tokens, every batch and number of cartridges."""
    rates = results("rollout.json")["rates"]
    assert len(rates) == 20
    for case, measured in rates.items():
        batch, _, cartridges = case.partition(" behind ")
        num_cartridges = min(int(batch), int(cartridges))
        sizing = replace(TORCH, answer_tokens=512, cartridge_tokens=2048 if num_cartridges else 0)
        seconds, _ = sizing.decode_step(int(batch), num_cartridges)
        assert seconds * 1e3 == near(measured["step_median_ms"], 0.16), case


def test_teacher_and_trainer() -> None:
    teacher, update = (results(f"{name}.json") for name in ("teacher", "update"))
    assert len(teacher["rows"]) == len(teacher["prefill"]) == 3
    for row in teacher["rows"]:
        assert replace(TORCH, document_tokens=row["document_tokens"]).score_seconds() == near(row["seconds"])
    for row in teacher["prefill"]:
        assert replace(TORCH, document_tokens=row["document_tokens"]).document_seconds() == near(row["seconds"])
    ours = [row for row in update["rows"] if row["name"] == "ours"]
    assert len(ours) >= 2
    for row in ours:
        sizing = replace(TORCH, batch_size=row["samples"], cartridge_tokens=row["prefix_tokens"])
        assert sizing.update_seconds() == near(row["seconds"])


def test_memory() -> None:
    """Within 10 %, where nothing else is said."""
    teacher, rollout, update = (results(f"{name}.json") for name in ("teacher", "rollout", "update"))
    assert TORCH.trainer_bytes(MICRO_BATCH_TOKENS) / 1e9 == near(update["rows"][0]["peak_gb"], 0.1)
    for row in teacher["prefill"]:
        kv_bytes = replace(TORCH, document_tokens=row["document_tokens"]).document_bytes
        # The room for captured steps is a server's, and more than documents need.
        assert row["peak_gb"] <= (TORCH.model.weight_bytes + kv_bytes + WORKSPACE_BYTES) / 1e9 <= 1.2 * row["peak_gb"]
    kv_bytes = 32 * TORCH.cartridge_bytes + 256 * (128 + 512) * TORCH.model.kv_bytes_per_token
    assert (TORCH.model.weight_bytes + kv_bytes + WORKSPACE_BYTES) / 1e9 == near(rollout["peak_gb"], 0.1)


def test_a_version_through_the_store() -> None:
    """With one reader; four on two cores share them."""
    measured = results("sync.json")["runs"][0]
    assert measured["num_readers"] == 1
    assert VLLM.cartridge_bytes == measured["num_bytes"]
    seconds = measured["median_seconds"]
    assert VLLM.version_seconds() == near(seconds["publish"] + seconds["fetch"])


def test_on_policy_steps_on_two_cores() -> None:
    """Of the demo's model and document. The turns are taken to be as long as those of its held-out questions: 19."""
    demo = results("on_policy.json")
    spec, whole_document = demo["run"]["spec"], demo["ways"][2]
    sizing = Sizing(
        model=MODELS["smollm2-135m"],
        gpu=GPUS["cpu-2-cores"],
        engine=ENGINES["torch"],
        document_tokens=whole_document["prefix_tokens"],
        cartridge_tokens=spec["num_tokens"],
        prompt_tokens=19,
        answer_tokens=demo["run"]["tokens_seen"] / spec["num_steps"] / spec["batch_size"],
        batch_size=spec["batch_size"],
        num_runs=1,
    )
    measured = demo["seconds_per_step"]
    assert sizing.rollout_seconds() == near(measured["rollout"])
    assert sizing.score_seconds() == near(measured["teacher"])
    assert sizing.update_seconds() == near(measured["update"])
    assert sizing.services()["trainer"].figures["step_seconds"] == near(measured["total"])


def test_replicas_grow_with_requests_and_keep_some_capacity() -> None:
    rollouts = [replace(VLLM, requests_per_second=rate).services()["rollout"] for rate in (1, 50, 500)]
    assert rollouts[0].gpus == 1
    assert rollouts[0].gpus < rollouts[1].gpus < rollouts[2].gpus
    assert all(rollout.load <= 0.7 for rollout in rollouts)


def test_runs_need_a_gpu_each_and_room_for_their_documents() -> None:
    services = replace(VLLM, num_runs=12, document_tokens=100_000).services()
    assert services["trainer"].gpus == 12
    # Each document takes 11.5 GB: five to a GPU.
    assert services["teacher"].figures["resident_documents"] == 5
    assert services["teacher"].gpus >= 3
    assert set(replace(VLLM, num_runs=0).services()) == {"rollout"}


def test_store_holds_versions_of_every_name() -> None:
    sizing = replace(VLLM, num_documents=100, num_runs=2)
    assert sizing.store() == {
        "redis_bytes": 402 * sizing.cartridge_bytes,
        # A checkpoint is three float32 for each number of two bytes.
        "object_storage_bytes": (1000 + 2 * 6) * sizing.cartridge_bytes,
    }


def test_what_fits_no_gpu_is_refused() -> None:
    l4 = replace(VLLM, gpu=GPUS["l4"])
    assert replace(l4, cartridge_tokens=8192).services()["rollout"].bound_by == "memory"
    with pytest.raises(InvalidArgument, match=r"does not fit beside weights of 65\.5 GB in 24 GB"):
        replace(l4, model=MODELS["qwen2.5-32b"]).services()
    with pytest.raises(InvalidArgument, match=r"a document's KV \(45\.9 GB\) does not fit"):
        replace(VLLM, gpu=GPUS["l40s"], num_runs=1, document_tokens=400_000).services()
    with pytest.raises(InvalidArgument, match=r"a cartridge in training, with one sample, \(1\d\.\d GB\) does not fit"):
        replace(l4, num_runs=1, cartridge_tokens=8192, answer_tokens=2000).services()
    with pytest.raises(InvalidArgument, match=r"a sequence alone gets 4\.\d tokens/s"):
        replace(VLLM, gpu=replace(GPUS["h100-80"], bandwidth_gb_per_s=60)).services()


def test_model_of_a_configuration(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }

    def read(**changed: object) -> Any:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        return find_model(str(tmp_path))

    assert read() == LLAMA_3B
    assert read(torch_dtype="float32").bytes_per_number == 4
    with pytest.raises(ModelUnsupported, match="num_local_experts"):
        read(num_local_experts=8)
    del config["intermediate_size"]
    with pytest.raises(ModelUnsupported, match="intermediate_size"):
        read()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        find_model(str(tmp_path))


def test_sizing_needs_no_torch() -> None:
    script = "import sys, foundry.sizing\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
