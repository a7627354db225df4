"""Writes the sizing table of docs/deploy.md with the arithmetic of `foundry size`; with --check says whether it is up
to date."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foundry.errors import InvalidArgument
from foundry.sizing.estimator import Estimator
from foundry.sizing.hardware import DEVICES, ENGINES
from foundry.sizing.shape import SHAPES
from foundry.sizing.workload import Keeping, Serving, Sizing, Training

PAGE = Path(__file__).with_name("deploy.md")
BEGIN, END = "<!-- sizing: made by docs/make_sizing.py -->\n", "<!-- sizing: end -->\n"
HEADER = (
    "| model, device | cartridge tokens | documents | requests/s | runs | rollout vLLM | bound by | rollout torch "
    "| teacher | trainer | Redis | objects |"
)
# `foundry size` for its options that the table does not name: documents of 12,000 tokens, 128 + 256 tokens a request.
KEEPING = Keeping(keep_hot=1)


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    device: str
    cartridge_tokens: int
    num_documents: int
    requests_per_second: float
    num_runs: int


ROWS = (
    Row("llama-3.2-3b", "l4", 512, 10, 1, 0),
    Row("llama-3.2-3b", "l40s", 2048, 100, 10, 1),
    Row("llama-3.2-3b", "h100-80", 512, 10, 1, 1),
    Row("llama-3.2-3b", "h100-80", 2048, 100, 10, 2),
    Row("llama-3.2-3b", "h100-80", 8192, 1000, 50, 4),
    Row("llama-3.1-8b", "a100-80", 2048, 100, 10, 2),
    Row("llama-3.1-8b", "h100-80", 512, 10, 1, 1),
    Row("llama-3.1-8b", "h100-80", 2048, 100, 10, 2),
    Row("llama-3.1-8b", "h100-80", 2048, 1000, 50, 4),
    Row("llama-3.1-8b", "h100-80", 8192, 1000, 50, 4),
    Row("qwen2.5-32b", "h200", 512, 10, 1, 1),
    Row("qwen2.5-32b", "h200", 2048, 100, 10, 2),
    Row("qwen2.5-32b", "h200", 2048, 1000, 50, 4),
)
# The demo: a document of 2,000 tokens, short answers, users who wait.
DEMO = Row("smollm2-135m", "cpu-2-cores", 512, 1, 0.2, 1)


Sizer = Callable[[Row, str], Sizing | None]


def table() -> str:
    columns = HEADER.count("|") - 1
    lines = [HEADER, "|" + "---|" * columns, line(DEMO, _demo), *(line(row, _size) for row in ROWS)]
    return "\n".join(lines) + "\n"


def line(row: Row, size: Sizer) -> str:
    vllm = None if row is DEMO else size(row, "vllm")
    torch = size(row, "torch")
    sizing = vllm or torch
    assert sizing is not None, row
    cells = [
        f"{row.model}, {row.device}",
        row.cartridge_tokens,
        row.num_documents,
        f"{row.requests_per_second:g}",
        row.num_runs,
        vllm.rollout.gpus if vllm else "–",
        sizing.rollout.bound_by,
        torch.rollout.gpus if torch else "too slow",
        sizing.teacher.gpus if sizing.teacher else 0,
        sizing.trainer.gpus if sizing.trainer else 0,
        byte_size(sizing.store.redis_bytes),
        byte_size(sizing.store.objects_bytes),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def byte_size(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e9:,.0f} GB" if number >= 1e10 else f"{number / 1e9:.1f} GB"


def _size(row: Row, engine: str) -> Sizing | None:
    """None where no user would get the speed asked for."""
    estimator = Estimator(shape=SHAPES[row.model], device=DEVICES[row.device], engine=ENGINES[engine])
    serving = Serving(
        num_documents=row.num_documents,
        cartridge_tokens=row.cartridge_tokens,
        requests_per_second=row.requests_per_second,
    )
    try:
        return estimator.size(serving, Training(num_runs=row.num_runs) if row.num_runs else None, KEEPING)
    except InvalidArgument as error:
        if error.field != "user_tokens_per_second":
            raise
        return None


def _demo(row: Row, engine: str) -> Sizing:
    estimator = Estimator(shape=SHAPES[row.model], device=DEVICES[row.device], engine=ENGINES[engine])
    serving = Serving(
        num_documents=row.num_documents,
        document_tokens=2000,
        cartridge_tokens=row.cartridge_tokens,
        requests_per_second=row.requests_per_second,
        prompt_tokens=32,
        answer_tokens=32,
        user_tokens_per_second=5,
    )
    training = Training(num_runs=row.num_runs, batch_size=16, turn_tokens=40, answer_tokens=24, num_steps=20)
    return estimator.size(serving, training, KEEPING)


def page() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"docs/deploy.md lost its marks {BEGIN!r} and {END!r}")
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() != page():
        print("docs/deploy.md has another sizing table than the code: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
