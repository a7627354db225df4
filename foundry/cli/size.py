"""foundry size: what a workload would take, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, TypeVar

import typer

from foundry import sizing
from foundry.cli.terminal import Json, print_json, print_table
from foundry.errors import InvalidArgument

Choice = TypeVar("Choice")


def size(
    model: Annotated[str, typer.Argument(help=f"{', '.join(sizing.MODELS)}, a model's directory, or a cached hub id.")],
    cartridge_tokens: Annotated[int, typer.Option(min=1, help="Length of a cartridge (p).")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents, each with its cartridge.")] = 100,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 12_000,
    requests_per_second: Annotated[float, typer.Option(min=0.0, help="Requests, evenly over documents.")] = 1.0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, served or trained on.")] = 256,
    runs: Annotated[int, typer.Option(min=0, help="Training runs at the same time.")] = 0,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(sizing.GPUS)}.")] = "h100-80",
    engine: Annotated[str, typer.Option(help="torch (the built-in one) or vllm.")] = "torch",
    as_json: Json = False,
) -> None:
    """Estimate GPUs, memory, storage and network for a workload.

    An estimate for before anything is measured: arithmetic on datasheets and on benchmarks/results. Measure your own
    workload before you buy.
    """
    needs = sizing.Sizing(
        model=sizing.find_model(model),
        gpu=_choose("gpu", gpu, sizing.GPUS),
        engine=_choose("engine", engine, sizing.ENGINES),
        num_documents=documents,
        document_tokens=document_tokens,
        cartridge_tokens=cartridge_tokens,
        requests_per_second=requests_per_second,
        answer_tokens=answer_tokens,
        num_runs=runs,
    )
    services = needs.services()
    gpus = sum(service.gpus for service in services.values())
    sizes = {
        "weights_bytes": needs.model.weight_bytes,
        "kv_bytes_per_token": needs.model.kv_bytes_per_token,
        "cartridge_bytes": needs.cartridge_bytes,
        "document_kv_bytes": needs.document_bytes,
        **needs.store(),
    }
    if as_json:
        found = {name: asdict(service) for name, service in services.items()}
        print_json(
            {"sizing": asdict(needs), "gpus": gpus, "sizes": sizes, "services": found, "assumptions": ASSUMPTIONS}
        )
        return
    print_table(["size", ""], [(_words(name), _figure(name, value)) for name, value in sizes.items()], empty="")
    rows: list[tuple[object, ...]] = [
        (name, service.gpus, f"{service.load:.0%}", service.bound_by) for name, service in services.items()
    ]
    print()
    print_table([gpu, "GPUs", "load", "bound by"], [*rows, ("all", gpus, "", "")], empty="")
    for name, service in services.items():
        print()
        figures = [(_words(name), _figure(name, value)) for name, value in service.figures.items()]
        print_table([f"{name}, each", ""], figures, empty="")
    print("\nAn estimate before measuring. It assumes:")
    for line in ASSUMPTIONS:
        print(f"- {line}")


def _choose(field: str, name: str, choices: Mapping[str, Choice]) -> Choice:
    if name not in choices:
        raise InvalidArgument(f"{field} {name!r} is not one of {', '.join(choices)}", field=field)
    return choices[name]


def _words(name: str) -> str:
    words = name.removesuffix("_seconds").removesuffix("_bytes").removesuffix("_hours")
    return words.replace("_bytes", "").replace("_", " ")


def _figure(name: str, value: float) -> str:
    if name.endswith("_seconds"):
        return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
    if name.endswith("_hours"):
        return f"{value:.1f} h"
    if "bytes" not in name:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


ASSUMPTIONS = (
    "Speeds are those of benchmarks/results: an H100 and an H200 with a model of 3B parameters, the demo on two cores.",
    "Other GPUs and models are taken to reach the same shares of the datasheet.",
    "With the engine torch launching takes 1.8 ms a layer; hosts differ from that by a quarter.",
    f"Prompts of 128 tokens, none of them in a cache; users get {sizing.USER_TOKENS_PER_SECOND:g} tokens/s at least.",
    f"Runs of {sizing.NUM_STEPS} steps of 32 answers; the stages of a step follow one another.",
    f"{sizing.KEEP_HOT} hot and {sizing.KEEP_DURABLE} durable versions of each name.",
    f"A version is published, and fetched, at {sizing.STORE_BYTES_PER_SECOND / 1e9:g} GB/s, as over loopback.",
    f"Memory is planned to {sizing.USABLE_MEMORY:.0%}, servers to {sizing.UTILISATION:.0%} of their capacity.",
    f"A replica is one GPU and decodes {sizing.LARGEST_BATCH} sequences at the most. No spare replica is counted: for "
    "availability run at least two rollout servers.",
)
