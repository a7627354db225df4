"""foundry size: what a workload would take, before anything is measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.terminal import Json, print_json, print_table
from foundry.errors import InvalidArgument, ModelNotFound

if TYPE_CHECKING:
    from foundry.sizing.estimator import Estimator
    from foundry.sizing.hardware import Device
    from foundry.sizing.shape import ModelShape
    from foundry.sizing.workload import Fleet, Sizing

_SHAPE_HELP = "Instead of, or over, the model's own."


def size(
    model: Annotated[
        str | None,
        typer.Argument(help="A name (llama-3.2-3b, ...), a directory with a config.json, or a hub id in the cache."),
    ] = None,
    cartridge_tokens: Annotated[int, typer.Option(min=1, help="Length of a cartridge (p).")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents, each with its cartridge.")] = 100,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 12_000,
    requests_per_second: Annotated[float, typer.Option(min=0.0, help="Requests, evenly over documents.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a request, without the cartridge.")] = 128,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    user_tokens_per_second: Annotated[float, typer.Option(min=0.1, help="Speed that each user must get.")] = 10.0,
    runs: Annotated[int, typer.Option(min=0, help="Training runs at the same time.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers of a training step.")] = 32,
    train_answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer in training.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 500,
    keep_hot: Annotated[int, typer.Option(min=1, help="The store's setting keep_hot.")] = 4,
    durable_versions: Annotated[int, typer.Option(min=1, help="Durable versions kept of each name.")] = 10,
    gpu: Annotated[str, typer.Option(help="a100-80, h100-80, h200, l40s, l4 or cpu-2-cores.")] = "h100-80",
    gpu_memory_gb: Annotated[float | None, typer.Option(min=0.1, help="Another GPU's memory, 10^9 bytes.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(min=0.001, help="Its dense 10^12 FLOP/s.")] = None,
    gpu_bandwidth: Annotated[float | None, typer.Option(min=0.1, help="Its memory bandwidth, 10^9 bytes/s.")] = None,
    gpus_per_replica: Annotated[int, typer.Option(min=1, help="GPUs that share the model's weights (vllm).")] = 1,
    engine: Annotated[str, typer.Option(help="torch (the built-in one) or vllm.")] = "torch",
    decode_efficiency: Annotated[
        float, typer.Option(min=0.001, help="Decoding speed relative to the engine's measured one; 1 is as measured.")
    ] = 1.0,
    compute_efficiency: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="Share of the FLOP/s that teacher and trainer reach.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    heads: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help=_SHAPE_HELP)] = None,
    bytes_per_number: Annotated[int | None, typer.Option(min=1, help="Of weights and KV: 2 is bfloat16.")] = None,
    as_json: Json = False,
) -> None:
    """Estimate GPUs, memory, storage and network for a workload.

    An estimate for before anything is measured: arithmetic on datasheets and on what was measured on one H100. Measure
    your own workload before you buy.
    """
    from foundry.sizing.estimator import Estimator
    from foundry.sizing.hardware import ENGINES
    from foundry.sizing.workload import Keeping, Serving, Training

    shape = _shape(
        model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        bytes_per_number=bytes_per_number,
    )
    if engine not in ENGINES:
        raise InvalidArgument(f"engine {engine!r} is not one of {', '.join(ENGINES)}", field="engine")
    estimator = Estimator(
        shape=shape,
        device=_device(gpu, gpu_memory_gb, gpu_tflops, gpu_bandwidth, compute_efficiency),
        engine=ENGINES[engine],
        gpus_per_replica=gpus_per_replica,
        decode_efficiency=decode_efficiency,
    )
    serving = Serving(
        num_documents=documents,
        document_tokens=document_tokens,
        cartridge_tokens=cartridge_tokens,
        requests_per_second=requests_per_second,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        user_tokens_per_second=user_tokens_per_second,
    )
    training = Training(num_runs=runs, batch_size=batch_size, answer_tokens=train_answer_tokens, num_steps=steps)
    keeping = Keeping(keep_hot=keep_hot, durable_versions=durable_versions)
    sizing = estimator.size(serving, training if runs else None, keeping)
    if as_json:
        values = {
            **asdict(estimator),
            "serving": asdict(serving),
            "training": asdict(training) if runs else None,
            "keeping": asdict(keeping),
            "sizing": {**asdict(sizing), "gpus": sizing.gpus},
            "assumptions": _assumptions(estimator),
        }
        print_json(values)
        return
    _print(estimator, sizing)


def _shape(model: str | None, **given: int | None) -> ModelShape:
    """Raises InvalidArgument, ModelNotFound, ModelUnsupported."""
    from foundry.sizing.shape import SHAPES, ModelShape, read_shape

    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        shape = SHAPES[model] if model in SHAPES else read_shape(_directory(model))
        return replace(shape, **values)
    missing = [name for name in given if name not in values and name != "bytes_per_number"]
    if missing:
        raise InvalidArgument(
            f"name a model ({', '.join(SHAPES)}, a directory or a hub id), or give all of its shape: "
            f"{', '.join(missing)} missing",
            field="model",
        )
    return ModelShape(name="given by options", **values)


def _directory(model: str) -> Path:
    """A local directory, or the hub's cached one. Nothing is fetched. Raises ModelNotFound."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached = try_to_load_from_cache(model, "config.json")
    except (ImportError, HFValidationError):
        cached = None
    if not isinstance(cached, str):
        raise ModelNotFound(
            f"{model!r} is no name that 'foundry size' knows, no directory, and not in the hub's cache; nothing is "
            "fetched for an estimate: give the shape by options (--layers, --kv-heads, ...)",
            field="model",
        )
    return Path(cached).parent


def _device(
    name: str,
    memory_gb: float | None,
    tflops: float | None,
    bandwidth_gb_per_s: float | None,
    compute_efficiency: float | None,
) -> Device:
    from foundry.sizing.hardware import DEVICES

    if name not in DEVICES:
        raise InvalidArgument(
            f"GPU {name!r} is not one of {', '.join(DEVICES)}; describe another with --gpu-memory-gb, --gpu-tflops and "
            "--gpu-bandwidth",
            field="gpu",
        )
    own = {"memory_gb": memory_gb, "tflops": tflops, "bandwidth_gb_per_s": bandwidth_gb_per_s}
    given: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
    if given:
        given |= {"name": f"{name}, changed", "source": "given by options"}
    if compute_efficiency is not None:
        given["compute_efficiency"] = compute_efficiency
    return replace(DEVICES[name], **given)


def _print(estimator: Estimator, sizing: Sizing) -> None:
    rollout, teacher, trainer, store = sizing.rollout, sizing.teacher, sizing.trainer, sizing.store
    print_table(
        ["per model and document", "size"],
        [
            ("weights", _bytes(sizing.weight_bytes)),
            ("KV of one token", _bytes(sizing.kv_bytes_per_token)),
            ("cartridge", _bytes(sizing.cartridge_bytes)),
            ("document's KV", _bytes(sizing.document_kv_bytes)),
        ],
        empty="",
    )
    print()
    rows = [
        _row(
            "rollout",
            rollout,
            f"{rollout.batch} sequences a replica, {rollout.step_seconds * 1e3:.1f} ms a step, "
            f"{rollout.tokens_per_second:.0f} tokens/s; prefill {rollout.prefill_seconds * 1e3:.1f} ms; "
            f"at most {rollout.requests_per_second:.1f} requests/s; {rollout.resident_cartridges} cartridges resident",
        )
    ]
    if teacher is not None:
        detail = (
            f"{teacher.resident_documents} documents resident, {teacher.document_seconds:.1f} s to read one, "
            f"{teacher.score_seconds:.2f} s to score a batch"
        )
        rows.append(_row("teacher", teacher, detail))
    if trainer is not None:
        detail = (
            f"{_bytes(trainer.memory_bytes)} at micro_batch_tokens {trainer.micro_batch_tokens}; a step "
            f"{trainer.step_seconds:.1f} s (rollout {trainer.rollout_seconds:.1f}, update "
            f"{trainer.update_seconds:.2f}), a run {trainer.run_hours:.1f} h"
        )
        rows.append(_row("trainer", trainer, detail))
    rows.append(("all", sizing.gpus, "", "", ""))
    print_table([estimator.device.name, "GPUs", "load", "bound by", "how"], rows, empty="")
    print()
    print_table(
        ["store", "size"],
        [
            ("Redis: hot versions of all names", _bytes(store.redis_bytes)),
            ("object storage: durable versions and checkpoints", _bytes(store.objects_bytes)),
            ("network for one version, to all replicas", _bytes(store.network_bytes_per_version)),
            ("one version over the network once", f"{store.version_seconds * 1e3:.0f} ms"),
        ],
        empty="",
    )
    print("\nAn estimate before measuring. It assumes:")
    for line in _assumptions(estimator):
        print(f"- {line}")


def _row(name: str, fleet: Fleet, how: str) -> tuple[object, ...]:
    return (name, fleet.gpus, f"{fleet.load:.0%}", fleet.bound_by, how)


def _bytes(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"


def _assumptions(estimator: Estimator) -> list[str]:
    from foundry.sizing.estimator import LARGEST_BATCH, LINK_GBIT_PER_S, USABLE_MEMORY, UTILISATION

    device, engine = estimator.device, estimator.engine
    origin = {
        "torch": "the built-in engine: its steps are bound by launching (1.8 ms a layer), measured on an H100 "
        "(benchmarks/results/gpu_rates.json) and different from host to host by half",
        "vllm": "vLLM 0.26.0 with CUDA graphs, measured on one H100 with a model of 3B parameters; its prefill is "
        "assumed",
    }[engine.name]
    return [
        f"{device.name}: {device.memory_gb:g} GB, {device.tflops:g} TFLOP/s, {device.bandwidth_gb_per_s:g} GB/s "
        f"({device.source}).",
        f"Decoding is that of {origin}; times {estimator.decode_efficiency:g} (--decode-efficiency).",
        f"Teacher and trainer reach {device.compute_efficiency:.0%} of the FLOP/s (--compute-efficiency), measured for "
        "our own code on an H100, and for cpu-2-cores with the demo.",
        f"Memory is planned to {USABLE_MEMORY:.0%}, servers to {UTILISATION:.0%} of their capacity, a replica to "
        f"{LARGEST_BATCH} sequences, the network to {LINK_GBIT_PER_S:g} Gbit/s.",
        "Requests are spread evenly over documents and over time; no prompt is found in a cache; answers have the "
        "length given. Several GPUs of one replica communicate for nothing.",
        "A run's stages follow one another; a training batch is decoded alone. No spare replica is counted: for "
        "availability run at least two rollout servers.",
    ]
