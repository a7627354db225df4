"""How much hardware a workload takes, by arithmetic: an estimate for before anything is measured. Imports no torch.

Bytes are counted. Times come from a roofline (https://doi.org/10.1145/1498765.1498785): what is read over the memory
bandwidth, what is computed over the FLOP/s, each by the share of the datasheet that was reached. The shares come from
`benchmarks/results` alone (an H100 and an H200 with a model of Llama-3.2-3B's shape, and the demo on two cores); each
names its file, and `tests/unit/test_sizing.py` holds them to it.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foundry.errors import InvalidArgument, ModelNotFound, ModelUnsupported
from foundry.identity import DTYPE_BYTES

NUM_STEPS = 500  # of a run: an assumption
USER_TOKENS_PER_SECOND = 5.0  # at least, for each user: as fast as people read; an assumption
UTILISATION = 0.7  # of a server's capacity, as requests come in bursts: an assumption
KEEP_HOT, KEEP_DURABLE = 4, 10  # versions of each name in Redis (the setting's default), in object storage (assumed)
USABLE_MEMORY = 0.9  # of a GPU: vLLM's default for `gpu_memory_utilization`
WORKSPACE_BYTES = 3.5e9  # of a server beside weights and KV: captured steps of up to 256 sequences (rollout.json)
LARGEST_BATCH = 256  # sequences of a replica: as far as decoding was measured (rollout.json, gpu_vllm.json)
MICRO_BATCH_TOKENS = 4608  # of the trainer, where memory allows: what it chooses
TRAINED_BYTES = 24  # of a cartridge's number in the trainer: 4 float32, and as much as 2 in passing (update.json)
CHECKPOINT_BYTES = 12  # of the same number in a checkpoint: master and two moments in float32
STORE_BYTES_PER_SECOND = 1.75e9  # publishing a version, and fetching it: copied, sent and hashed (sync.json, loopback)


@dataclass(frozen=True, slots=True)
class Model:
    """A dense decoder with grouped-query attention and a gated MLP (Llama, Qwen, Mistral), as config.json has it.

    Norms and biases are left out: less than 0.1 % of any model here.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    bytes_per_number: int

    @property
    def layer_parameters(self) -> int:
        """Of all layers: queries and output, keys and values, and the MLP's three matrices."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return (self.layer_parameters + self.head_parameters * (2 - self.tied_embeddings)) * self.bytes_per_number

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_number

    def forward_flops(self, num_samples: int, tokens: float, prefix_tokens: int) -> tuple[float, float]:
        """(matrices, attention) of the layers, for samples of `tokens` each behind a prefix whose KV is there.

        2 FLOP per parameter and token; 4 per query head, dimension, token and token seen.
        """
        num_tokens, mean_context = num_samples * tokens, prefix_tokens + tokens / 2
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * num_tokens * mean_context
        return 2.0 * self.layer_parameters * num_tokens, attention


MODELS = {
    "smollm2-135m": Model(30, 9, 3, 64, 576, 1536, 49152, True, 4),  # the demo's, in float32
    "llama-3.2-3b": Model(28, 24, 8, 128, 3072, 8192, 128256, True, 2),
    "llama-3.1-8b": Model(32, 32, 8, 128, 4096, 14336, 128256, False, 2),
    "qwen2.5-32b": Model(64, 40, 8, 128, 5120, 27648, 152064, False, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """How fast an engine is; shares are of the datasheet's figures."""

    host_seconds_per_layer: float = 0.0  # to launch its kernels, while the device works on those before
    weight_share: float = 1.0  # of the bandwidth; what any decode step costs besides is in it
    reread_share: float = 0.0  # of a cartridge, that memory gives again to each further sequence of the step
    flops_share: float | None = None  # what each sequence costs besides is in it; None: the GPU's `forward_share`


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_gb: float  # 10^9 bytes
    tflops: float  # dense 10^12 FLOP/s in bfloat16, by the datasheet
    bandwidth_gb_per_s: float
    update_share: float = 0.46  # of the FLOP/s in an update (update.json)
    forward_share: float = 0.54  # the same, while documents are computed and scored behind: 0.51 to 0.58 (teacher.json)
    decoding: EngineSpeed | None = None  # of the built-in engine, where that is another


GPUS = {
    "a100-80": Gpu(80, 312, 2039),
    "h100-80": Gpu(80, 989, 3350),
    "h200": Gpu(141, 989, 4800),
    "l40s": Gpu(48, 362, 864),
    "l4": Gpu(24, 121, 300),
    # 2 cores with AVX2 at 2.7 GHz in float32: 32 FLOP a cycle and core. Bandwidth and share: on_policy.json.
    "cpu-2-cores": Gpu(
        8, 0.17, 5, update_share=0.54, forward_share=0.54, decoding=EngineSpeed(host_seconds_per_layer=1.8e-3)
    ),
}


ENGINES = {
    # All of rollout.json. A shared cartridge is read once.
    "torch": EngineSpeed(weight_share=0.42, flops_share=0.51),
    # All of gpu_vllm.json. What is read again comes from the L2 cache in part.
    "vllm": EngineSpeed(weight_share=0.50, reread_share=0.45, flops_share=0.34),
}


@dataclass(frozen=True, slots=True)
class ServiceSize:
    gpus: int
    bound_by: str  # what limits the GPUs' work, and so their number
    load: float  # share of their time that the workload takes
    figures: dict[str, float]  # more, by names that carry their units


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """A workload on one kind of GPU: requests, spread evenly over documents, and on-policy runs at the same time.

    Every replica of a service is one GPU with all weights; the stages of a training step follow each other.
    """

    model: Model
    gpu: Gpu
    engine: EngineSpeed
    num_documents: int = 100
    document_tokens: int = 12_000
    cartridge_tokens: int = 2048
    requests_per_second: float = 1.0
    prompt_tokens: float = 128  # of a request or a training prompt, without the cartridge
    answer_tokens: float = 256  # served or trained on
    num_runs: int = 0
    batch_size: int = 32  # answers of a training step

    @property
    def sample_tokens(self) -> float:
        return self.prompt_tokens + self.answer_tokens

    @property
    def cartridge_bytes(self) -> int:
        return self.cartridge_tokens * self.model.kv_bytes_per_token

    @property
    def document_bytes(self) -> int:
        return self.document_tokens * self.model.kv_bytes_per_token

    def store(self) -> dict[str, float]:
        """Bytes in Redis and in object storage, also of names that train no more. A run that publishes has a version
        more, and a checkpoint."""
        checkpoint_bytes = self.cartridge_bytes // self.model.bytes_per_number * CHECKPOINT_BYTES
        durable_bytes = self.num_documents * KEEP_DURABLE * self.cartridge_bytes
        return {
            "redis_bytes": (self.num_documents * KEEP_HOT + self.num_runs) * self.cartridge_bytes,
            "object_storage_bytes": durable_bytes + self.num_runs * checkpoint_bytes,
        }

    def decode_step(self, batch: int, cartridges: float) -> tuple[float, str]:
        """(seconds, bound by) of a token for each of `batch` sequences behind so many different cartridges.

        Reading and computing add up, the host launches meanwhile. 2 FLOP per parameter and sequence.
        """
        model, engine, bandwidth = self.model, self.gpu.decoding or self.engine, self.gpu.bandwidth_gb_per_s * 1e9
        parameters = model.layer_parameters + model.head_parameters
        # On average a sequence has half of its answer.
        own_bytes = batch * (self.prompt_tokens + self.answer_tokens / 2) * model.kv_bytes_per_token
        shared_bytes = (cartridges + max(0.0, batch - cartridges) * engine.reread_share) * self.cartridge_bytes
        weight_bytes = parameters * model.bytes_per_number / engine.weight_share
        reading = (weight_bytes + own_bytes + shared_bytes) / bandwidth
        computing = self._seconds(2 * parameters * batch, engine.flops_share)
        seconds, host = reading + computing, model.num_layers * engine.host_seconds_per_layer
        return max(seconds, host), "host" if host > seconds else "bandwidth" if reading > computing else "FLOP/s"

    def prefill_seconds(self, prompts: int) -> float:
        flops = sum(self.model.forward_flops(prompts, self.prompt_tokens, self.cartridge_tokens))
        return self._seconds(flops, (self.gpu.decoding or self.engine).flops_share)

    def rollout_seconds(self) -> float:
        """A training batch, alone on a replica."""
        return self.prefill_seconds(self.batch_size) + self.answer_tokens * self.decode_step(self.batch_size, 1)[0]

    def document_seconds(self) -> float:
        """The teacher computes a document's KV, once."""
        return self._seconds(sum(self.model.forward_flops(1, self.document_tokens, 0)))

    def score_seconds(self) -> float:
        """A training batch behind the document. The trainer makes logits of the hidden states: no LM head."""
        return self._seconds(sum(self.model.forward_flops(self.batch_size, self.sample_tokens, self.document_tokens)))

    def update_seconds(self) -> float:
        """Forward, loss and backward to the prefix, in micro-batches of several samples; weights get no gradient.

        FLOPs: 2 x matrices (forward, gradient of activations), 3.5 x attention (forward, and 2.5 backward as in
        FlashAttention, https://arxiv.org/abs/2205.14135) and 3 x LM head on answers (student, teacher, gradient).
        """
        matrices, attention = self.model.forward_flops(self.batch_size, self.sample_tokens, self.cartridge_tokens)
        head = 2 * self.model.head_parameters * self.batch_size * self.answer_tokens
        return self._seconds(2 * matrices + 3.5 * attention + 3 * head, self.gpu.update_share)

    def version_seconds(self) -> float:
        """From the trainer's memory to a rollout server's, by way of the store."""
        return 2 * self.cartridge_bytes / STORE_BYTES_PER_SECOND

    def trainer_bytes(self, tokens: float) -> float:
        """Weights, cartridge, and what the backward of `tokens` keeps (`foundry.model.packing`)."""
        model = self.model
        trained = self.cartridge_bytes / model.bytes_per_number * TRAINED_BYTES
        heads = (model.num_heads + model.num_kv_heads) * model.head_dim
        kept = model.num_layers * 2 * (model.hidden_size + heads + model.intermediate_size) * model.bytes_per_number
        return model.weight_bytes + trained + tokens * kept

    def services(self) -> dict[str, ServiceSize]:
        """Rollout, and teacher and trainer if there are runs. Raises InvalidArgument if a replica can't hold what it
        must, or decodes slower than users want."""
        if not self.num_runs:
            return {"rollout": self._rollout(0.0)}
        stages = {
            "rollout_seconds": self.rollout_seconds(),
            "score_seconds": self.score_seconds(),
            "update_seconds": self.update_seconds(),
            "version_seconds": self.version_seconds(),
        }
        step_seconds = sum(stages.values())
        sampling, scoring = (self.num_runs * stages[f"{name}_seconds"] / step_seconds for name in ("rollout", "score"))
        run_hours = (self.document_seconds() + NUM_STEPS * step_seconds) / 3600

        resident = self._free_bytes("a document's KV", self.document_bytes) // self.document_bytes
        by_memory, by_time = math.ceil(self.num_runs / resident), math.ceil(scoring / UTILISATION)
        teachers, bound_by = max(by_memory, by_time), "memory" if by_memory > by_time else "FLOP/s"
        teacher = {"resident_documents": resident, "document_seconds": self.document_seconds()}
        hidden_bytes = self.model.hidden_size * self.model.bytes_per_number
        teacher["network_bytes_per_step"] = self.batch_size * self.answer_tokens * hidden_bytes

        least = self.trainer_bytes(self.sample_tokens) - self.model.weight_bytes
        free = self._free_bytes("a cartridge in training, with one sample,", least) + self.model.weight_bytes
        tokens = MICRO_BATCH_TOKENS if self.trainer_bytes(MICRO_BATCH_TOKENS) <= free else self.sample_tokens
        trainer = {"memory_bytes": self.trainer_bytes(tokens), "micro_batch_tokens": tokens}
        trainer |= {"step_seconds": step_seconds, **stages, "run_hours": run_hours}
        trainer["network_bytes_per_version"] = self.cartridge_bytes
        return {
            "rollout": self._rollout(sampling),
            "teacher": ServiceSize(teachers, bound_by, scoring / teachers, teacher),
            "trainer": ServiceSize(self.num_runs, "runs", stages["update_seconds"] / step_seconds, trainer),
        }

    def _rollout(self, training: float) -> ServiceSize:
        """The largest batch that fits, and in which users get their speed. `training`: replicas busy with that."""
        sequence_bytes = self.sample_tokens * self.model.kv_bytes_per_token
        free = self._free_bytes("a cartridge with a sequence", self.cartridge_bytes + sequence_bytes)
        batch, seconds, bound_by = 0, 0.0, ""
        for larger in range(1, LARGEST_BATCH + 1):
            # Expected number of different documents in a batch.
            cartridges = self.num_documents * (1 - (1 - 1 / self.num_documents) ** larger)
            if larger * sequence_bytes + cartridges * self.cartridge_bytes > free:
                bound_by = "memory"
                break
            slower, slower_by = self.decode_step(larger, cartridges)
            if slower * USER_TOKENS_PER_SECOND > 1:
                break
            batch, seconds, bound_by = larger, slower, slower_by
        if not batch:
            raise InvalidArgument(
                f"even a sequence alone gets {1 / self.decode_step(1, 1)[0]:.1f} tokens/s, users want "
                f"{USER_TOKENS_PER_SECOND:g}: choose a faster GPU, or the engine vllm",
                field="engine",
            )
        capacity = 1 / (self.prefill_seconds(1) + self.answer_tokens * seconds / batch)
        busy = self.requests_per_second / capacity + training
        gpus = max(1, math.ceil(busy / UTILISATION))
        figures = {
            "sequences": batch,
            "step_seconds": seconds,
            "tokens_per_second": batch / seconds,
            "prefill_seconds": self.prefill_seconds(1),
            "requests_per_second": capacity,
            # What does not fit beside a full batch comes from host memory, or the store.
            "resident_cartridges": (free - batch * sequence_bytes) // self.cartridge_bytes,
            "network_bytes_per_version": gpus * self.cartridge_bytes,
        }
        return ServiceSize(gpus, bound_by, busy / gpus, figures)

    def _seconds(self, flops: float, share: float | None = None) -> float:
        return flops / ((share or self.gpu.forward_share) * self.gpu.tflops * 1e12)

    def _free_bytes(self, what: str, needed: float) -> float:
        """Of a replica beside its weights. Raises InvalidArgument if that is less than `what` needs."""
        free = self.gpu.memory_gb * 1e9 * USABLE_MEMORY - self.model.weight_bytes - WORKSPACE_BYTES
        if needed > free:
            raise InvalidArgument(
                f"{what} ({needed / 1e9:.1f} GB) does not fit beside weights of "
                f"{self.model.weight_bytes / 1e9:.1f} GB in {self.gpu.memory_gb:g} GB: choose a larger GPU, or shorter "
                "cartridges, documents or answers",
                field="gpu",
            )
        return free


def find_model(name: str) -> Model:
    """A known name, a directory with a config.json, or a hub id in the cache; nothing is fetched.

    Raises ModelNotFound, and ModelUnsupported for what is no dense decoder.
    """
    if name in MODELS:
        return MODELS[name]
    path: object = Path(name).expanduser() / "config.json"
    if not Path(name).expanduser().is_dir():
        with suppress(ImportError, ValueError):  # the package is not there, or the name can't be a hub id
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(name, "config.json") or path
    try:
        config = json.loads(Path(str(path)).read_text())
    except (OSError, ValueError) as error:
        known = f"not one of {', '.join(MODELS)}, no directory with a config.json, and not in the hub's cache"
        raise ModelNotFound(
            f"{name!r} is {known}; nothing is fetched for an estimate: {error}", field="model"
        ) from error
    config = config.get("text_config", config)
    if experts := [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]:
        raise ModelUnsupported(f"{name} has {experts[0]}: this arithmetic is for dense models", field="model")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        tied = bool(config.get("tie_word_embeddings"))
        num_bytes = DTYPE_BYTES[config.get("dtype") or config.get("torch_dtype") or "bfloat16"]
        layers, mlp, vocab = (config[key] for key in ("num_hidden_layers", "intermediate_size", "vocab_size"))
    except KeyError as error:
        raise ModelUnsupported(f"{name}'s configuration is not a dense decoder's: {error}", field="model") from error
    return Model(layers, heads, kv_heads, head_dim, hidden, mlp, vocab, tied, num_bytes)
