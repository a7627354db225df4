"""vLLM behind the engine's protocol. Its scheduler and model are in a process of their own; here is what its answers
become."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.config import KVTransferConfig
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.logprobs import Logprob
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from foundry.errors import InvalidArgument, Unavailable
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelInfo
from foundry.model.rotation import KeyRotation
from services.rollout.engine import EngineStats, PromptLogprobs, SequenceRequest, TokenOutput
from services.rollout.engine.answer import AnswerProgress
from services.rollout.engine.vllm.connector import ADDRESS, DIGESTS, NUM_TOKENS, SEQUENCE, CartridgeConnector
from services.rollout.engine.vllm.handover import ENDED, Handover
from services.rollout.engine.vllm.metrics import Metrics

# What would spread the model or its requests over several.
_ONE_WORKER = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "distributed_executor_backend",
        "nnodes",
    }
)
# Ids that hold a sequence's number.
_NUMBER_IDS = 4


@dataclass(slots=True)
class _Open:
    """A sequence that has not ended."""

    request: SequenceRequest
    num_cartridge_tokens: int
    progress: AnswerProgress
    # As far as the first token has not come.
    prompt_logprobs: PromptLogprobs | None = None


class VllmEngine:
    """See `Engine`. Cartridges are kept in (pinned) host memory of vLLM's process; those in use also in its KV memory,
    as long as its prefix cache keeps them."""

    def __init__(
        self,
        directory: Path,
        info: ModelInfo,
        *,
        model_name: str,
        device: str,
        dtype: torch.dtype,
        max_sequences: int,
        max_context_tokens: int,
        prefill_tokens_per_step: int,
        gpu_memory_utilization: float = 0.9,
        kv_bytes: int | None = None,
        cuda_graphs: bool = True,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads the model. `engine_args` are further ones of vLLM's `EngineArgs`.

        Raises InvalidArgument if this build of vLLM is not for the device, or one of `engine_args` can't be set.
        """
        if device != current_platform.device_type:
            raise InvalidArgument(
                f"this vLLM runs on {current_platform.device_type}, not on {device}; which GPU, of several, is said by "
                "CUDA_VISIBLE_DEVICES",
                field="device",
            )
        self._info = info
        self.rotation = KeyRotation.of_directory(directory, info)
        self._dtype = dtype
        self._num_tokens: dict[str, int] = {}
        self._open: dict[int, _Open] = {}
        self._max_sequences = max_sequences
        self._lost = False
        self._handover = Handover()
        on_cuda = device == "cuda"
        # Decoding sequences count too. On the CPU vLLM can't cut prompts in pieces: it winds the generators of seeded
        # sequences back after a piece, which torch's for the CPU don't take.
        tokens_per_step = prefill_tokens_per_step + max_sequences if on_cuda else max_context_tokens + max_sequences
        arguments: dict[str, Any] = {
            "model": str(directory),
            "served_model_name": model_name,
            # Grammars need one there; ids are turned into text here.
            "skip_tokenizer_init": False,
            "structured_outputs_config": {"backend": "guidance"},
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_context_tokens,
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": tokens_per_step,
            "enable_chunked_prefill": on_cuda,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_bytes,
            "enforce_eager": not (cuda_graphs and on_cuda),
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": False,
            "use_tqdm_on_load": False,
            "kv_transfer_config": KVTransferConfig(
                kv_connector=CartridgeConnector.__name__,
                kv_connector_module_path=CartridgeConnector.__module__,
                kv_role="kv_consumer",
                kv_connector_extra_config={ADDRESS: self._handover.address},
            ),
        }
        _check_further(engine_args or {}, arguments)
        # Its scheduler and worker beside this process, which has threads: a fork would copy their locks as they are.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments, **(engine_args or {})), stat_loggers=[Metrics])
        self._handover.connect(self._lose)
        # vLLM keeps the answer; one that is awaited when its process ends is awaited for ever.
        self._llm.get_supported_tasks()
        (self._metrics,) = (each for each in self._llm.logger_manager.stat_loggers if isinstance(each, Metrics))
        cache = self._llm.vllm_config.cache_config
        self._kv_bytes = cache.num_gpu_blocks * cache.block_size * info.spec.kv_bytes_per_token(dtype)

    def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
        for sequence_id, request in requests.items():
            self._handover.hold(str(sequence_id), request.digests)
            num_cartridge_tokens = sum(self._num_tokens[digest] for digest in request.digests)
            progress = AnswerProgress(request.sampling, self._info.text, self._info.eos_ids)
            self._open[sequence_id] = _Open(request, num_cartridge_tokens, progress)
            prompt = _prompt(sequence_id, request, num_cartridge_tokens, self._info.spec.vocab_size)
            self._llm.add_request(str(sequence_id), prompt, self._sampling(sequence_id, self._open[sequence_id]))

    def step(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        try:
            answered = self._llm.step()
        except EngineDeadError as error:
            raise Unavailable(ENDED) from error
        for output in answered:
            sequence_id = int(output.request_id)
            # One that was cancelled may have been in the batch.
            if (each := self._open.get(sequence_id)) is not None:
                outputs += self._take(sequence_id, each, output)
        return outputs

    def cancel(self, sequence_id: int) -> None:
        if self._open.pop(sequence_id, None) is not None:
            self._llm.abort_request([str(sequence_id)])

    def load(self, digest: str, cartridge: Cartridge) -> None:
        # Token by token, so that what is missing behind a cached beginning is one block of memory.
        kv_PL2GD = cartridge.kv_L2GPD.permute(3, 0, 1, 2, 4)
        self._num_tokens[digest] = len(kv_PL2GD)
        self._handover.load(digest, kv_PL2GD, self._dtype)

    def unload(self, digest: str) -> None:
        # What the prefix cache still holds is known by the digest, so it is right for as long as it is there.
        self._handover.unload(digest)

    def stats(self) -> EngineStats:
        """As of the last step. Raises Unavailable when vLLM's process has ended."""
        if self._lost:
            raise Unavailable(ENDED)
        num_running = min(self._metrics.num_running, len(self._open))
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._open) - num_running,
            num_slots=self._max_sequences,
            kv_bytes=self._kv_bytes,
            # A step that only lets go of sequences is not reported.
            kv_used_bytes=int(self._metrics.kv_usage * self._kv_bytes) if self._open else 0,
        )

    def _lose(self) -> None:
        self._lost = True
        core = self._llm.engine_core
        if isinstance(core, SyncMPClient):
            # Whoever waits for a step would wait for ever.
            core.outputs_queue.put(Unavailable(ENDED))

    def _take(self, sequence_id: int, each: _Open, output: RequestOutput) -> Iterator[TokenOutput]:
        (new,) = output.outputs
        num_cached = (output.num_cached_tokens or 0) - each.num_cartridge_tokens
        if num_cached < 0:
            raise RuntimeError(f"vLLM answered sequence {sequence_id} without the cartridges before it")
        sampling = each.request.sampling
        if output.prompt_logprobs and sampling.num_prompt_logprobs is not None:
            # Before them stands what there is no logprob of: placeholders, and the prompt's first token.
            told = output.prompt_logprobs[each.num_cartridge_tokens + 1 :]
            each.prompt_logprobs = _scored(each.request.prompt_ids[1:], told, sampling.num_prompt_logprobs)
        for token_id, logprobs in zip(new.token_ids, new.logprobs or [], strict=True):
            text, finish_reason = each.progress.append(token_id)
            if finish_reason is not None:
                self.cancel(sequence_id)
            yield TokenOutput(
                sequence_id=sequence_id,
                token_id=token_id,
                logprob=logprobs[token_id].logprob,
                top_logprobs=_top(logprobs, each.request.sampling.num_logprobs),
                text=text,
                text_offset=each.progress.text_offset,
                finish_reason=finish_reason,
                digests=each.request.digests,
                cartridge_tokens=each.num_cartridge_tokens,
                cached_tokens=num_cached,
                # Of the clock that is `time.perf_counter()`'s here, in every process.
                scheduled_at=output.metrics.scheduled_ts,
                prompt_logprobs=each.prompt_logprobs,
            )
            each.prompt_logprobs = None
            if finish_reason is not None:
                return
        if output.finished:
            raise RuntimeError(f"vLLM ended sequence {sequence_id} before its end: {new.finish_reason}")

    def _sampling(self, sequence_id: int, each: _Open) -> SamplingParams:
        sampling = each.request.sampling
        transfer = {
            SEQUENCE: str(sequence_id),
            DIGESTS: list(each.request.digests),
            NUM_TOKENS: each.num_cartridge_tokens,
        }
        grammar = None
        if sampling.grammar is not None:
            grammar = StructuredOutputsParams(grammar=sampling.grammar.spec)
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            # vLLM's are signed.
            seed=sampling.seed % 2**63,
            stop_token_ids=sorted(each.progress.end_ids),
            ignore_eos=True,
            min_tokens=sampling.min_tokens,
            min_p=sampling.min_p,
            logit_bias=dict(sampling.logit_bias) or None,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            structured_outputs=grammar,
            logprobs=sampling.num_logprobs,
            prompt_logprobs=sampling.num_prompt_logprobs,
            # Else a scored prompt's cartridges were not loaded. What may be read is said by ids and salt.
            skip_reading_prefix_cache=False,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer},
        )


def _check_further(engine_args: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for arguments that are unknown or ours."""
    known = {field.name for field in fields(EngineArgs)}
    for name in engine_args:
        if name not in known:
            fault = f"vLLM {vllm.__version__} has no engine argument {name}"
        elif name in ours:
            fault = f"the foundry sets vLLM's {name} itself, by the settings of the rollout service"
        elif name in _ONE_WORKER:
            fault = f"cartridges reach one worker: vLLM's {name} can't be set; more GPUs are more replicas"
        else:
            continue
        raise InvalidArgument(fault, field="vllm.engine_args")


def _prompt(sequence_id: int, request: SequenceRequest, num_placeholders: int, vocab_size: int) -> TokensInput:
    """Placeholders and prompt. vLLM's prefix cache knows a block by its ids, those before it, and the salt: tenant and
    digests, which are never spelled alike.

    A sequence that must not reuse a prompt's KV, or whose prompt is scored, has its number in the last placeholders. So
    only the last block of its cartridges is its own; the others stay shared, since what was written there is the same
    bytes for all.
    """
    # A token that a repetition penalty must not find in the prompt is none of its own: no block is shared then.
    penalised = request.sampling.repetition_penalty != 1
    placeholders = [request.prompt_ids[0] if penalised else 0] * num_placeholders
    salt = ",".join((*filter(None, [request.tenant]), *request.digests))
    if request.skip_prefix_cache or request.sampling.num_prompt_logprobs is not None:
        if penalised or num_placeholders < _NUMBER_IDS:
            salt += f"#{sequence_id}"
        else:
            number = [sequence_id // vocab_size**power % vocab_size for power in range(_NUMBER_IDS)]
            placeholders[-_NUMBER_IDS:] = number
    return tokens_input([*placeholders, *request.prompt_ids], cache_salt=salt or None)


def _scored(ids: Sequence[int], told: Sequence[Mapping[int, Logprob]], num: int) -> PromptLogprobs:
    own = [logprobs[token_id] for token_id, logprobs in zip(ids, told, strict=True)]
    top = [_top(logprobs, num) for logprobs in told]
    return PromptLogprobs(
        torch.tensor([each.logprob for each in own]),
        torch.tensor([each.rank for each in own]),
        torch.tensor([[token_id for token_id, _ in each] for each in top], dtype=torch.long).view(len(top), num),
        torch.tensor([[logprob for _, logprob in each] for each in top]).view(len(top), num),
    )


def _top(logprobs: Mapping[int, Logprob], num: int) -> tuple[tuple[int, float], ...]:
    """The `num` most likely; the sampled token is among `logprobs` too, wherever it stands."""
    best = sorted(logprobs.items(), key=lambda item: item[1].logprob, reverse=True)[:num]
    return tuple((token_id, each.logprob) for token_id, each in best)
