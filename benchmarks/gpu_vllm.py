"""The vLLM engine on a GPU: python -m benchmarks.gpu_vllm

A model of Llama-3.2-3B's shape with random weights, in bfloat16. First the numbers: greedy answers behind a cartridge
against a float32 forward, teacher-forced. Then the speed of the engine (seeds, logprobs and text for every token, as
services ask for them) without a cartridge, with one that all share and with 8, beside that of vLLM alone in the same
process; how soon a batch starts; and what a new version (234.9 MB) costs those that are decoding.

Runs without the packages that services need besides: torch, transformers and vLLM are enough.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise, product
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from transformers import LlamaForCausalLM
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks.shapes import LLAMA_3B, build_model
from foundry.buffers import allocate
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelSpec
from foundry.model.lm import FrozenLM
from services.rollout.engine import SamplingParams, SequenceRequest, TokenOutput
from services.rollout.engine.vllm.engine import VllmEngine
from tests.tiny import build_tokenizer

NUM_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 2048, 128, 512
FINGERPRINT = "blake3:" + "0" * 64


def request(
    seed: int, *digests: str, prompt: int = PROMPT_TOKENS, new: int = NEW_TOKENS, temperature: float = 1.0
) -> SequenceRequest:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 128000, (prompt,), generator=generator).tolist()
    sampling = SamplingParams(max_new_tokens=new, temperature=temperature, seed=seed, ignore_eos=True)
    return SequenceRequest(tuple(ids), digests, sampling)


def finish(engine: VllmEngine, requests: Mapping[int, SequenceRequest]) -> dict[int, list[TokenOutput]]:
    engine.admit(requests)
    outputs: dict[int, list[TokenOutput]] = {key: [] for key in requests}
    while engine.stats().num_running or engine.stats().num_waiting:
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    return outputs


def random_cartridge(spec: ModelSpec, seed: int) -> Cartridge:
    generator = torch.Generator().manual_seed(seed)
    shape = spec.kv_shape(NUM_TOKENS)
    return in_memory(spec, torch.randn(shape, generator=generator) * 0.1)


def in_memory(spec: ModelSpec, kv_L2GPD: Tensor) -> Cartridge:
    """In bfloat16 and in the memory that cartridges come in from the store."""
    header = spec.header(kv_L2GPD.shape[3], 1, torch.bfloat16)
    memory = torch.frombuffer(allocate(header.num_bytes), dtype=torch.bfloat16).view(kv_L2GPD.shape)
    return Cartridge(header, memory.copy_(kv_L2GPD))


def document_ids(seed: int, num_tokens: int) -> list[int]:
    ids: list[int] = torch.randint(10, 128000, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def document_cartridge(lm: FrozenLM, seed: int, num_tokens: int) -> Cartridge:
    """KV of random text, as an initial cartridge has it."""
    return in_memory(lm.spec, lm.prefill(document_ids(seed, num_tokens)))


@torch.no_grad()
def regrets(
    exact: FrozenLM, outputs: Sequence[TokenOutput], prompt: Sequence[int], kv_L2GPD: Tensor | None
) -> tuple[list[float], list[float]]:
    """Of each token of an answer, by one float32 forward: how far it lies below the best, and how far the logprob that
    the engine told lies from its own; in nats."""
    ids = [output.token_id for output in outputs]
    prefix = None if kv_L2GPD is None else kv_L2GPD.to("cuda", torch.float32)
    hidden = exact.packed_hidden([[*prompt, *ids[:-1]]], [prefix])[len(prompt) - 1 :]
    logprobs = exact.logits(hidden).log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
    told = torch.tensor([output.logprob for output in outputs], device="cuda")
    return (logprobs.max(dim=-1).values - chosen).tolist(), (told - chosen).abs().tolist()


def summary(case: str, found: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any]:
    regret = [each for one, _ in found for each in one]
    error = [each for _, one in found for each in one]
    return {
        "case": case,
        "num_answers": len(found),
        "argmax_equal": sum(each == 0 for each in regret) / len(regret),
        "largest_regret_nats": max(regret),
        "median_regret_nats": statistics.median(regret),
        "median_logprob_error": statistics.median(error),
        "largest_logprob_error": max(error),
    }


def correctness(
    engine: VllmEngine, exact: FrozenLM, lengths: Sequence[int] = (NUM_TOKENS, 333)
) -> list[dict[str, Any]]:
    """Greedy answers behind two versions of each length, each twice (the second time out of vLLM's prefix cache); as if
    another version had decoded them; and, for what bfloat16 costs by itself, with the same text as a plain prompt."""
    rows = []
    for num_tokens in lengths:
        seeds = {f"{num_tokens}@{version}": 100 * num_tokens + version for version in (1, 2)}
        cartridges = {name: document_cartridge(exact, seed, num_tokens) for name, seed in seeds.items()}
        for name, cartridge in cartridges.items():
            engine.load(name, cartridge)
        for name, other in zip(cartridges, reversed(cartridges), strict=True):
            requests = {seed: request(seed, name, prompt=64, new=64, temperature=0.0) for seed in range(8)}
            answers = [finish(engine, requests) for _ in range(2)]
            for digest, case in ((name, f"cartridge {name}"), (other, f"{name} taken for {other}")):
                found = [
                    regrets(exact, outputs, requests[seed].prompt_ids, cartridges[digest].kv_L2GPD)
                    for answer in answers
                    for seed, outputs in answer.items()
                ]
                rows.append(summary(case, found))
        document = document_ids(seeds[name], num_tokens)
        plain = {
            seed: replace(each, prompt_ids=(*document, *each.prompt_ids), digests=()) for seed, each in requests.items()
        }
        found = [
            regrets(exact, outputs, plain[seed].prompt_ids, None) for seed, outputs in finish(engine, plain).items()
        ]
        rows.append(summary(f"document of {num_tokens} tokens as a prompt", found))
        for name in cartridges:
            engine.unload(name)
    return rows


def rate(step: Callable[[], Mapping[str, int] | None], batch: int) -> dict[str, float]:
    """Decode tokens a second from the last sequence's first token to the first one's end. `step` returns how many
    tokens came for whom; it is called until nothing is left."""
    times: list[float] = []
    tokens: list[int] = []
    counts: Counter[str] = Counter()
    while (found := step()) is not None:
        counts.update(found)
        if len(counts) == batch and max(counts.values()) < NEW_TOKENS:
            times.append(time.perf_counter())
            tokens.append(sum(found.values()))
    return {
        "decode_tokens_per_second": sum(tokens[1:]) / (times[-1] - times[0]),
        "median_step_ms": statistics.median(after - before for before, after in pairwise(times)) * 1e3,
    }


def speed(
    engine: VllmEngine,
    batch: int,
    use: Sequence[tuple[str, ...]],
    ids: Iterator[int],
    document: tuple[int, ...] = (),
) -> dict[str, float]:
    """The engine's, with all that services ask for. `document` stands before every prompt, and is cached."""
    requests = (request(1000 + index, *use[index]) for index in range(batch))
    engine.admit({next(ids): replace(each, prompt_ids=(*document, *each.prompt_ids)) for each in requests})

    def step() -> Mapping[str, int] | None:
        stats = engine.stats()
        if not stats.num_running + stats.num_waiting:
            return None
        return Counter(str(output.sequence_id) for output in engine.step())

    return rate(step, batch)


def speeds(engine: VllmEngine, ids: Iterator[int]) -> list[dict[str, Any]]:
    """Two rounds of every case, in which cartridges c0 to c7 are loaded."""
    rows: list[dict[str, Any]] = []
    for batch, round_ in product((32, 256), range(2)):
        cases: dict[str, list[tuple[str, ...]]] = {
            "no cartridge": [()] * batch,
            "one shared": [("c0",)] * batch,
            "8 distinct": [(f"c{index % 8}",) for index in range(batch)],
        }
        for case, use in cases.items():
            rows.append({"batch": batch, "round": round_, "case": case, **speed(engine, batch, use, ids)})
        rows.append({"batch": batch, "round": round_, "case": "vLLM alone", **vllm_alone(engine, batch, ids)})
        print(*rows[-4:], sep="\n", flush=True)
    return rows


def first_tokens(engine: VllmEngine, batch: int, digest: str, ids: Iterator[int], *, anew: bool) -> float:
    """Milliseconds until all of a batch have their first token. `anew`: as training asks, no prompt's KV reused."""
    requests = {
        next(ids): replace(request(3000 + index, digest, new=2), skip_prefix_cache=anew) for index in range(batch)
    }
    began = time.perf_counter()
    engine.admit(requests)
    waiting = set(requests)
    while waiting:
        waiting -= {output.sequence_id for output in engine.step()}
    milliseconds = (time.perf_counter() - began) * 1e3
    for sequence_id in requests:
        engine.cancel(sequence_id)
    return milliseconds


def vllm_alone(engine: VllmEngine, batch: int, ids: Iterator[int]) -> dict[str, float]:
    """vLLM's own loop: ids only, without seeds, logprobs and text."""
    for index in range(batch):
        name = str(next(ids))
        engine._handover.hold(name, ())
        sampling = vllm.SamplingParams(
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": {"sequence": name, "digests": [], "num_tokens": 0}},
        )
        engine._llm.add_request(name, tokens_input(list(request(5000 + index).prompt_ids)), sampling)

    def step() -> Mapping[str, int] | None:
        if not engine._llm.has_unfinished_requests():
            return None
        return {output.request_id: len(output.outputs[0].token_ids) for output in engine._llm.step()}

    return rate(step, batch)


def swap(engine: VllmEngine, cartridges: list[Cartridge], ids: Iterator[int]) -> dict[str, float]:
    """32 sequences decode behind one cartridge while others are loaded, and one sequence starts behind each."""
    engine.load("old", cartridges[0])
    running = {next(ids): request(9000 + index, "old", new=1900) for index in range(32)}
    engine.admit(running)
    calm: list[float] = []
    busy: list[float] = []
    loads: list[float] = []
    firsts: list[float] = []
    arrived: dict[int, float] = {}
    loaded: list[str] = []

    def load_all() -> None:
        for index in range(8):
            began = time.perf_counter()
            engine.load(f"new-{index}", cartridges[1 + index % 2])
            loads.append((time.perf_counter() - began) * 1e3)
            loaded.append(f"new-{index}")
            time.sleep(0.1)

    loader = threading.Thread(target=load_all)
    last = 0.0
    for index in range(1500):
        if index == 300:
            loader.start()
        while loaded:
            name = loaded.pop()
            sequence_id = next(ids)
            arrived[sequence_id] = time.perf_counter()
            engine.admit({sequence_id: request(sequence_id, name, new=4)})
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.sequence_id in arrived:
                firsts.append((now - arrived.pop(output.sequence_id)) * 1e3)
        if index > 100:
            (calm if index < 300 else busy).append((now - last) * 1e3)
        last = now
        if index > 310 and not loader.is_alive() and not arrived and not loaded:
            break
    loader.join()
    for sequence_id in running:
        engine.cancel(sequence_id)
    return {
        "calm_median_ms": statistics.median(calm),
        "calm_largest_ms": max(calm),
        "loading_median_ms": statistics.median(busy),
        "loading_largest_ms": max(busy),
        "load_median_ms": statistics.median(loads),
        "load_first_ms": loads[0],
        "first_token_median_ms": statistics.median(firsts),
        "first_token_largest_ms": max(firsts),
        "num_loads": len(loads),
    }


def load(directory: Path, *, cuda_graphs: bool = True) -> tuple[FrozenLM, VllmEngine, float]:
    """The model in float32, the engine, and the seconds that it took to start."""
    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    exact = FrozenLM(model.to("cuda"), build_tokenizer(), FINGERPRINT)
    began = time.perf_counter()
    engine = VllmEngine(
        directory,
        exact.info,
        model_name="llama",
        device="cuda",
        dtype=torch.bfloat16,
        max_sequences=256,
        max_context_tokens=4096,
        prefill_tokens_per_step=8192,
        gpu_memory_utilization=0.8,
        kv_bytes=44 * 1024**3,
        cuda_graphs=cuda_graphs,
    )
    return exact, engine, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("/tmp/gpu-vllm-model"))
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "gpu_vllm.json")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        build_model(arguments.model, "cuda", LLAMA_3B, 8192)
        torch.cuda.empty_cache()
    exact, engine, start_seconds = load(arguments.model, cuda_graphs=not arguments.eager)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "engine_start_seconds": start_seconds,
    }
    ids = count(100)
    result["correct"] = correctness(engine, exact)
    print(json.dumps(result, indent=1), flush=True)
    cartridges = [random_cartridge(exact.spec, seed) for seed in range(8)]
    for index, cartridge in enumerate(cartridges):
        engine.load(f"c{index}", cartridge)
    result["speed"] = speeds(engine, ids)
    result["first_tokens_of_a_batch_ms"] = {
        f"{batch}, {'anew' if anew else 'cached'}": [
            first_tokens(engine, batch, "c1", ids, anew=anew) for _ in range(3)
        ]
        for batch in (32, 256)
        for anew in (False, True)
    }
    print(result["first_tokens_of_a_batch_ms"])
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    for index in range(8):
        engine.unload(f"c{index}")
    result["swap"] = [swap(engine, cartridges, ids) for _ in range(2)]
    print(json.dumps(result["swap"], indent=1))
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
