"""GPUs and engines as `foundry size` reckons with them: what a datasheet promises, and what share of it was reached.

Measured figures: one H100 80GB HBM3, a model of Llama-3.2-3B's shape with random weights in bfloat16.
`benchmarks/results/gpu_rates.json` holds those of our own code; those of vLLM 0.26.0 (CUDA graphs, 128 prompt and 512
new tokens) stand beside the test that compares them with this model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device. `tflops` are dense 10^12 FLOP/s in the numbers that the model runs in, by the datasheet."""

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gb_per_s: float
    source: str
    compute_efficiency: float = 0.22
    """Share of `tflops` that our forward and backward reach: measured on the H100 (a document's KV 0.23,
    scoring 0.24, a training step 0.22), and taken to be the same on other GPUs. Compiled layers
    with FlexAttention reached 0.34 in a prototype."""

    def times(self, count: int) -> Device:
        """`count` of them as one: no cost of communication is counted."""
        return replace(
            self,
            memory_gb=self.memory_gb * count,
            tflops=self.tflops * count,
            bandwidth_gb_per_s=self.bandwidth_gb_per_s * count,
        )


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-80",
            memory_gb=80,
            tflops=312,
            bandwidth_gb_per_s=2039,
            source="NVIDIA A100 datasheet, 80GB SXM, BF16 dense",
        ),
        Device(
            name="h100-80",
            memory_gb=80,
            tflops=989,
            bandwidth_gb_per_s=3350,
            source="NVIDIA H100 datasheet, SXM, BF16 dense",
        ),
        Device(
            name="h200",
            memory_gb=141,
            tflops=989,
            bandwidth_gb_per_s=4800,
            source="NVIDIA H200 datasheet, SXM, BF16 dense",
        ),
        Device(
            name="l40s", memory_gb=48, tflops=362, bandwidth_gb_per_s=864, source="NVIDIA L40S datasheet, BF16 dense"
        ),
        Device(name="l4", memory_gb=24, tflops=121, bandwidth_gb_per_s=300, source="NVIDIA L4 datasheet, BF16 dense"),
        # Efficiency: teacher 0.75 and update 0.65 in benchmarks/results/demo.json.
        Device(
            name="cpu-2-cores",
            memory_gb=8,
            tflops=0.17,
            bandwidth_gb_per_s=20,
            source="2 cores with AVX2 at 2.7 GHz, float32: 2 x 32 FLOP a cycle; bandwidth assumed",
            compute_efficiency=0.7,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How fast a rollout engine decodes. Shares are of the datasheet; the times of a step's parts add up."""

    name: str
    weight_bandwidth_share: float = 0.55
    """Weights, with all that a step costs however many sequences there are: vLLM at batch 32 and 256, extrapolated to
    none."""
    kv_bandwidth_share: float = 0.97
    """KV that is read once: vLLM, 32 distinct 2048-token cartridges against none."""
    reread_bandwidth_share: float = 2.0
    """KV that another sequence of the step has read already: it comes from the L2 cache in part. vLLM, one cartridge
    shared by 32 and by 256."""
    flops_share: float = 0.65
    """Matrix products of a decode step, with what each sequence costs besides: vLLM, batch 256 against 32."""
    shared_read_once: bool
    """Whether a shared cartridge is read once a step, instead of once for each sequence."""
    host_seconds_per_layer: float = 0.0
    """Time that the host needs to launch a layer, where it is not hidden by CUDA graphs."""
    prefill_efficiency: float | None = None
    """Share of the datasheet's FLOP/s in prefill; None: the device's `compute_efficiency`."""
    tensor_parallel: bool


ENGINES = {
    engine.name: engine
    for engine in (
        # Launching bounds it: 41 to 70 ms a step, whatever the batch, on three machines with an H100; 50 by this.
        Engine(name="torch", shared_read_once=True, host_seconds_per_layer=1.8e-3, tensor_parallel=False),
        # Its prefill was not measured: 0.5 is an assumption.
        Engine(name="vllm", shared_read_once=False, prefill_efficiency=0.5, tensor_parallel=True),
    )
}
