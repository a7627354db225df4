"""How much hardware a workload takes, by arithmetic: an estimate for before anything is measured.

Bytes are counted; times come from a roofline (https://doi.org/10.1145/1498765.1498785): what is read over the memory
bandwidth, what is computed over the FLOP/s, each times the share of the datasheet that was measured
(`foundry.sizing.hardware`). Times of a step's parts are added up, not overlapped. Shapes: `foundry.sizing.shape`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foundry.errors import InvalidArgument
from foundry.sizing.hardware import Device, Engine
from foundry.sizing.shape import ModelShape
from foundry.sizing.workload import Keeping, Rollout, Serving, Sizing, Step, Store, Teacher, Trainer, Training

USABLE_MEMORY = 0.9
"""Share of a device's memory that is planned with: vLLM's default for `gpu_memory_utilization`."""
UTILISATION = 0.7
"""Share of its capacity at which a server is run: requests come in bursts. An assumption."""
LARGEST_BATCH = 256
"""Sequences of one replica: as far as decoding was measured."""
WORKSPACE_BYTES = 1e9
"""Of a teacher or rollout server beside weights and KV; 0.1 to 0.7 GB measured (gpu_rates.json)."""
TRAINED_NUMBER_BYTES = 24
"""Trainer's memory per number of the cartridge: master, gradient and two moments in float32, and as much as two more
for casts and the optimiser's temporaries; 23.8 measured (gpu_rates.json)."""
CHECKPOINT_NUMBER_BYTES = 12
"""Master and two moments in float32."""
MOST_MICRO_BATCH_TOKENS = 4096
"""The trainer's default `micro_batch_tokens`."""
LINK_GBIT_PER_S = 25.0
"""Network over which a version goes from the trainer to Redis, and from there to rollout servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """The arithmetic for one model on one kind of device.

    `decode_efficiency` is decoding speed relative to the engine's model in `foundry.sizing.hardware`. Raises
    InvalidArgument where the workload does not fit at all, saying what would.
    """

    shape: ModelShape
    device: Device
    engine: Engine
    gpus_per_replica: int = 1
    decode_efficiency: float = 1.0

    def __post_init__(self) -> None:
        if self.gpus_per_replica > 1 and not self.engine.tensor_parallel:
            raise InvalidArgument(
                f"the {self.engine.name} engine runs on one GPU: gpus_per_replica is for vllm", field="gpus_per_replica"
            )
        if self.free_bytes <= 0:
            needed = math.ceil(
                (self.shape.weight_bytes + WORKSPACE_BYTES) / (self.device.memory_gb * 1e9 * USABLE_MEMORY)
            )
            raise InvalidArgument(
                f"the weights of {self.shape.name} take {self.shape.weight_bytes / 1e9:.0f} GB and do not fit "
                f"{self.gpus_per_replica} x {self.device.name}: choose a larger GPU, or {needed} per replica with vllm",
                field="device",
            )

    @property
    def replica(self) -> Device:
        return self.device.times(self.gpus_per_replica)

    @property
    def free_bytes(self) -> float:
        """Of a replica, for KV: memory x `USABLE_MEMORY` - weights - `WORKSPACE_BYTES`."""
        return self.replica.memory_gb * 1e9 * USABLE_MEMORY - self.shape.weight_bytes - WORKSPACE_BYTES

    def size(self, serving: Serving, training: Training | None, keeping: Keeping) -> Sizing:
        cartridge_numbers = serving.cartridge_tokens * self.shape.kv_numbers_per_token
        cartridge_bytes = cartridge_numbers * self.shape.bytes_per_number
        version_seconds = cartridge_bytes * 8 / (LINK_GBIT_PER_S * 1e9)
        teacher = trainer = None
        replicas_training = 0.0
        if training is not None:
            document_seconds, score_seconds = self.teacher_seconds(serving.document_tokens, training)
            trainer = self._trainer(serving, training, document_seconds, score_seconds, 2 * version_seconds)
            teacher = self._teacher(serving, training, trainer, document_seconds, score_seconds)
            replicas_training = training.num_runs * trainer.rollout_seconds / trainer.step_seconds
        rollout = self._rollout(serving, cartridge_bytes, replicas_training)
        num_runs = training.num_runs if training is not None else 0
        replicas = rollout.gpus // self.gpus_per_replica
        return Sizing(
            cartridge_bytes=cartridge_bytes,
            kv_bytes_per_token=self.shape.kv_bytes_per_token,
            document_kv_bytes=serving.document_tokens * self.shape.kv_bytes_per_token,
            weight_bytes=self.shape.weight_bytes,
            rollout=rollout,
            teacher=teacher,
            trainer=trainer,
            store=Store(
                # Also names that no longer train keep theirs; while a run publishes there is one more.
                redis_bytes=(serving.num_documents * keeping.keep_hot + num_runs) * cartridge_bytes,
                objects_bytes=serving.num_documents * keeping.durable_versions * cartridge_bytes
                + num_runs * cartridge_numbers * CHECKPOINT_NUMBER_BYTES,
                version_seconds=version_seconds,
                network_bytes_per_version=(1 + replicas) * cartridge_bytes,
            ),
        )

    def decode_step(self, batch: int, own_tokens: float, cartridge_tokens: int, num_cartridges: float) -> Step:
        """One token for each of `batch` sequences with `own_tokens` of KV each, behind `num_cartridges` distinct ones.

        bandwidth = weights / (share_w B) + (own KV + distinct cartridges) / (share_kv B) + re-read KV / (share_r B)
        flops     = batch x (2 x parameters read + attention) / (share_f F)
        host      = layers x seconds to launch one
        with B bytes/s and F FLOP/s of the datasheet. KV is re-read only by engines that read a shared cartridge once
        for each sequence.
        """
        shape, engine = self.shape, self.engine
        bandwidth, flops = self.replica.bandwidth_gb_per_s * 1e9, self.replica.tflops * 1e12
        cartridge_bytes = cartridge_tokens * shape.kv_bytes_per_token
        read_once = batch * own_tokens * shape.kv_bytes_per_token + num_cartridges * cartridge_bytes
        read_again = 0.0 if engine.shared_read_once else (batch - num_cartridges) * cartridge_bytes
        seconds = (
            shape.decode_read_bytes / engine.weight_bandwidth_share
            + read_once / engine.kv_bandwidth_share
            + read_again / engine.reread_bandwidth_share
        ) / bandwidth
        work = shape.linear_flops(batch) + shape.head_flops(batch)
        return Step(
            bandwidth=seconds / self.decode_efficiency,
            flops=work / (engine.flops_share * flops) / self.decode_efficiency,
            host=shape.num_layers * engine.host_seconds_per_layer / self.decode_efficiency,
        )

    def prefill_seconds(self, num_tokens: float, cartridge_tokens: int) -> float:
        """A prompt behind its cartridge: forward of the layers, the cartridge's own KV is there already."""
        shape = self.shape
        flops = shape.linear_flops(num_tokens) + shape.attention_flops(num_tokens, cartridge_tokens + num_tokens / 2)
        efficiency = self.engine.prefill_efficiency or self.device.compute_efficiency
        return flops / (efficiency * self.replica.tflops * 1e12)

    def teacher_seconds(self, document_tokens: int, training: Training) -> tuple[float, float]:
        """(computing a document's KV once, scoring one batch behind it): forward FLOPs over those reached.

        Scoring: each token of turn and answer sees the document and half of its own sample. The trainer computes the
        teacher's logits from hidden states, so the LM head is not counted here.
        """
        shape = self.shape
        document = shape.linear_flops(document_tokens) + shape.attention_flops(document_tokens, document_tokens / 2)
        num_tokens = training.batch_size * training.sample_tokens
        scoring = shape.linear_flops(num_tokens) + shape.attention_flops(
            num_tokens, document_tokens + training.sample_tokens / 2
        )
        return document / self._reached_flops, scoring / self._reached_flops

    def update_seconds(self, cartridge_tokens: int, training: Training) -> float:
        """Forward, loss and backward to the prefix; no gradient of weights is computed.

        FLOPs = 2 x layers (forward, gradient of activations) + 3.5 x attention (forward, and 2.5 backward as in
        FlashAttention, https://arxiv.org/abs/2205.14135) + 3 x LM head on answers (student, teacher, gradient).
        """
        shape = self.shape
        num_tokens = training.batch_size * training.sample_tokens
        attention = shape.attention_flops(num_tokens, cartridge_tokens + training.sample_tokens / 2)
        head = shape.head_flops(training.batch_size * training.answer_tokens)
        return (2 * shape.linear_flops(num_tokens) + 3.5 * attention + 3 * head) / self._reached_flops

    def rollout_seconds(self, cartridge_tokens: int, training: Training) -> float:
        """One batch of answers of the longest length, alone on a replica, all behind the run's cartridge."""
        own_tokens = training.turn_tokens + training.answer_tokens / 2
        step = self.decode_step(training.batch_size, own_tokens, cartridge_tokens, 1)
        prefill = self.prefill_seconds(training.turn_tokens, cartridge_tokens)
        return training.batch_size * prefill + training.answer_tokens * step.seconds

    @property
    def activation_bytes_per_token(self) -> int:
        """Kept for the backward: of each layer 8 hidden vectors and 4 of the MLP. 9 % above what was measured."""
        shape = self.shape
        numbers = shape.num_layers * (8 * shape.hidden_size + 4 * shape.intermediate_size)
        return numbers * shape.bytes_per_number

    @property
    def _reached_flops(self) -> float:
        return self.device.compute_efficiency * self.replica.tflops * 1e12

    def _rollout(self, serving: Serving, cartridge_bytes: int, replicas_training: float) -> Rollout:
        batch, step, at_memory = self._largest_batch(serving, cartridge_bytes)
        prefill_seconds = self.prefill_seconds(serving.prompt_tokens, serving.cartridge_tokens)
        capacity = 1 / (prefill_seconds + serving.answer_tokens * step.seconds / batch)
        busy = serving.requests_per_second / capacity + replicas_training
        replicas = max(1, math.ceil(busy / UTILISATION))
        sequences_bytes = batch * (serving.prompt_tokens + serving.answer_tokens) * self.shape.kv_bytes_per_token
        return Rollout(
            gpus=replicas * self.gpus_per_replica,
            load=busy / replicas,
            bound_by="memory" if at_memory else step.bound_by,
            batch=batch,
            step_seconds=step.seconds,
            tokens_per_second=batch / step.seconds,
            prefill_seconds=prefill_seconds,
            requests_per_second=capacity,
            resident_cartridges=int((self.free_bytes - sequences_bytes) // cartridge_bytes),
        )

    def _largest_batch(self, serving: Serving, cartridge_bytes: int) -> tuple[int, Step, bool]:
        """(sequences, their step, whether memory allows no more). Raises InvalidArgument if not even one fits."""
        sequence_tokens = serving.prompt_tokens + serving.answer_tokens
        # At work a sequence holds its prompt and half of its answer on the average; memory is kept for all of it.
        own_tokens = serving.prompt_tokens + serving.answer_tokens / 2

        def step(batch: int) -> Step:
            return self.decode_step(batch, own_tokens, serving.cartridge_tokens, distinct(batch, serving.num_documents))

        def fits(batch: int) -> bool:
            cartridges = distinct(batch, serving.num_documents) * cartridge_bytes
            return batch * sequence_tokens * self.shape.kv_bytes_per_token + cartridges <= self.free_bytes

        def quick(batch: int) -> bool:
            return step(batch).seconds * serving.user_tokens_per_second <= 1

        if not fits(1):
            raise InvalidArgument(
                f"one cartridge of {cartridge_bytes / 1e9:.1f} GB and one sequence do not fit the "
                f"{self.free_bytes / 1e9:.1f} GB that the weights leave: choose a larger GPU or a shorter cartridge",
                field="device",
            )
        if not quick(1):
            raise InvalidArgument(
                f"even a sequence alone gets {1 / step(1).seconds:.1f} tokens/s with the {self.engine.name} engine: "
                f"ask for less than {serving.user_tokens_per_second:g}, or choose a faster GPU or engine",
                field="user_tokens_per_second",
            )
        batch = 1
        while batch < LARGEST_BATCH and fits(batch + 1) and quick(batch + 1):
            batch += 1
        return batch, step(batch), batch < LARGEST_BATCH and not fits(batch + 1)

    def _teacher(
        self, serving: Serving, training: Training, trainer: Trainer, document_seconds: float, score_seconds: float
    ) -> Teacher:
        document_bytes = serving.document_tokens * self.shape.kv_bytes_per_token
        resident = int(self.free_bytes // document_bytes)
        if not resident:
            raise InvalidArgument(
                f"a document's KV takes {document_bytes / 1e9:.1f} GB, the weights leave {self.free_bytes / 1e9:.1f}: "
                "choose a larger GPU for the teacher or shorter documents",
                field="document_tokens",
            )
        busy = training.num_runs * score_seconds / trainer.step_seconds
        by_memory, by_time = math.ceil(training.num_runs / resident), max(1, math.ceil(busy / UTILISATION))
        replicas = max(by_memory, by_time)
        return Teacher(
            gpus=replicas * self.gpus_per_replica,
            load=busy / replicas,
            bound_by="memory" if by_memory > by_time else "FLOP/s",
            document_seconds=document_seconds,
            score_seconds=score_seconds,
            resident_documents=resident,
        )

    def _trainer(
        self,
        serving: Serving,
        training: Training,
        document_seconds: float,
        score_seconds: float,
        version_seconds: float,
    ) -> Trainer:
        """One worker, or Job, for each run."""
        cartridge_numbers = serving.cartridge_tokens * self.shape.kv_numbers_per_token
        fixed_bytes = self.shape.weight_bytes + cartridge_numbers * TRAINED_NUMBER_BYTES
        left_bytes = self.replica.memory_gb * 1e9 * USABLE_MEMORY - fixed_bytes
        micro_batch_tokens = min(MOST_MICRO_BATCH_TOKENS, int(left_bytes // self.activation_bytes_per_token))
        if micro_batch_tokens < training.sample_tokens:
            needed = fixed_bytes + training.sample_tokens * self.activation_bytes_per_token
            raise InvalidArgument(
                f"the trainer needs {needed / USABLE_MEMORY / 1e9:.0f} GB for one sample of {training.sample_tokens} "
                f"tokens, a replica has {self.replica.memory_gb:g}: choose a larger GPU, shorter cartridges or answers",
                field="device",
            )
        rollout_seconds = self.rollout_seconds(serving.cartridge_tokens, training)
        update_seconds = self.update_seconds(serving.cartridge_tokens, training)
        step_seconds = rollout_seconds + score_seconds + update_seconds + version_seconds
        return Trainer(
            gpus=training.num_runs * self.gpus_per_replica,
            load=update_seconds / step_seconds,
            bound_by="memory" if micro_batch_tokens < MOST_MICRO_BATCH_TOKENS else "FLOP/s",
            rollout_seconds=rollout_seconds,
            update_seconds=update_seconds,
            step_seconds=step_seconds,
            run_hours=(document_seconds + training.num_steps * step_seconds) / 3600,
            memory_bytes=fixed_bytes + micro_batch_tokens * self.activation_bytes_per_token,
            micro_batch_tokens=micro_batch_tokens,
        )


def distinct(batch: int, num_documents: int) -> float:
    """Expected number of different documents among `batch` requests that are spread evenly over all."""
    return float(num_documents * (1 - (1 - 1 / num_documents) ** batch))
