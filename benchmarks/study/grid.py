"""The study: its jobs, and several processes that go through them: python -m benchmarks.study.grid --out DIR

Jobs whose results are in DIR are done; whatever ends a call, the next one goes on. What matters most comes first. On a
GPU start `nvidia-cuda-mps-control -d` beforehand: without it the processes take turns.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.study.cache import Cache, write_atomically
from benchmarks.study.document import FINAL, SMOKE, StudyDocument, documents, read_document
from benchmarks.study.experiment import MARKS, Bench
from benchmarks.study.job import Job
from foundry.identity import Dtype
from foundry.local.demo_model import demo_model_directory
from foundry.model.lm import FrozenLM

DOCUMENTS = tuple(documents())
SEEDS = (0, 1, 2)
# The usual one first.
COMPRESSIONS = (4, 8, 2, 16)
FAMILIES = ("recite", "quote", "blank", "evidence", "question")
# The recipe's: what holds more has less to learn.
RATES = {2: 0.007, 4: 0.014, 8: 0.028, 16: 0.028}
# Untrained, in place of what `compact` has.
COMPACT_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"refit": False},
    {"sequential": False},
    {"restore_mass": False},
    {"matching_steps": 0},
    {"matching_steps": 800},
    {"refit": False, "sequential": False, "restore_mass": False, "matching_steps": 0},
    {"power": 1.0},
    {"power": 4.0},
    {"shown": "recite"},
    {"shown": "cloze"},
    {"shown": "questions"},
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is done on every document with every seed; the table's row is called `label`."""

    label: str
    job: Job

    def jobs(self, names: Sequence[str] = DOCUMENTS, seeds: Sequence[int] = SEEDS) -> list[Job]:
        return [replace(self.job, document=name, seed=seed) for seed, name in product(seeds, names)]


def _cell(label: str, **values: Any) -> Cell:
    return Cell(label, Job(document="", **values))


CURVES = [
    _cell(f"n/{compression}", compression=compression, answer_tokens=250_000, learning_rate=RATES[compression])
    for compression in COMPRESSIONS
]
# Half of what else is compared: the policy's own answers take longest of all.
_MODE_TOKENS = 50_000
STARTS_AND_MODES = [
    _cell(f"{start}, {mode}", start=start, mode=mode, answer_tokens=_MODE_TOKENS)
    for start, mode in product(("compact", "first_tokens", "random"), ("hybrid", "off", "on"))
]
STARTS_AND_MODES_ELSEWHERE = [
    Cell(
        f"{cell.label}, n/{compression}",
        replace(cell.job, compression=compression, learning_rate=RATES[compression]),
    )
    for compression in sorted(COMPRESSIONS)
    if compression != COMPRESSIONS[0]
    for cell in STARTS_AND_MODES
]
# The same prompts, whoever answers. What a mode does not read keeps its usual value: jobs that do the same are equal.
SAME_PROMPTS = [
    cell
    for family in ("question", "cloze")
    for cell in (
        _cell(f"{family}, off", mode="off", families=(family,), answer_tokens=_MODE_TOKENS),
        _cell(f"{family}, on", mode="on", asked=family, answer_tokens=_MODE_TOKENS),
    )
]
FAMILY_ABLATION = [
    _cell(" + ".join(families), mode="off", families=families, answer_tokens=100_000)
    for families in (
        FAMILIES,
        *(tuple(other for other in FAMILIES if other != family) for family in FAMILIES),
        *((family,) for family in FAMILIES),
        *((*FAMILIES, other) for other in ("cloze", "summary")),
    )
]
# The recipe, and with one thing changed.
CHANGES = [
    _cell(
        ", ".join(f"{name} {value}" for name, value in change.items()) or "the recipe",
        mode="off",
        answer_tokens=100_000,
        **change,
    )
    for change in (
        {},
        {"hard_label_weight": 0.0},
        {"hard_label_weight": 0.25},
        {"hard_label_weight": 1.0},
        {"learning_rate": 0.007},
        {"learning_rate": 0.028},
        {"batch_size": 16, "learning_rate": 0.01},
        {"batch_size": 64, "learning_rate": 0.02},
        {"max_grad_norm": 0.0},
        {"matching_steps": 0},
        {"matching_steps": 0, "restore_mass": False, "refit": False},
        {"objective": "reverse_kl"},
        {"objective": "nll"},
    )
]
# How near the model behind a cartridge can come to itself, up to where hardly anything else is trained on.
GENERAL = [
    # All of the document's KV, which nothing has trained.
    _cell("the whole document", start="first_tokens", compression=1),
    *(
        _cell(f"{share} of the prompts", mode="off", answer_tokens=100_000, general_share=share)
        for share in (0.03, 0.1, 0.3)
    ),
    _cell(
        "0.95 of the prompts, no hard labels",
        mode="off",
        answer_tokens=100_000,
        general_share=0.95,
        hard_label_weight=0.0,
        families=("recite", "quote", "blank", "question"),
    ),
]
INITIALISERS = [
    *(
        _cell(
            ", ".join(("compact", *(f"{name} {value}" for name, value in variant.items()))) + f", n/{compression}",
            compression=compression,
            **variant,
        )
        for compression, variant in product(COMPRESSIONS, COMPACT_VARIANTS)
    ),
    *(
        _cell(f"{start}, n/{compression}", compression=compression, start=start)
        for compression, start in product(COMPRESSIONS, ("first_tokens", "random"))
    ),
]
GROUPS = {
    "curves": CURVES,
    "starts and modes": STARTS_AND_MODES,
    "initialisers": INITIALISERS,
    "families": FAMILY_ABLATION,
    "changes": CHANGES,
    "general": GENERAL,
    "same prompts": SAME_PROMPTS,
    "starts and modes elsewhere": STARTS_AND_MODES_ELSEWHERE,
}
_SMOKE: dict[str, Any] = {
    "answer_tokens": 200,
    "batch_size": 4,
    "max_new_tokens": 16,
    "families": ("recite",),
    "num_questions": 4,
    "general_share": 0.0,
}
SMOKE_CELLS = [
    _cell("compact, hybrid", off_policy_share=0.5, **_SMOKE),
    _cell("first_tokens, off", start="first_tokens", mode="off", **_SMOKE),
    _cell("random", start="random"),
]


def jobs(cells: Sequence[Cell], names: Sequence[str] = DOCUMENTS, seeds: Sequence[int] = SEEDS) -> list[Job]:
    """Each once, all documents and seeds of one cell before the next."""
    return list(dict.fromkeys(job for cell in cells for job in cell.jobs(names, seeds)))


def left(wanted: Sequence[Job], out: Path) -> list[Job]:
    """Those that nobody has done."""
    return [job for job in wanted if not (out / f"{job.id}.json").exists()]


class Runner:
    """Does jobs that nobody has done, and writes what came of each."""

    def __init__(
        self,
        lm: FrozenLM,
        out: Path,
        about: dict[str, Any],
        marks: Sequence[int] = MARKS,
        read: Callable[[str], StudyDocument] = read_document,
    ) -> None:
        """`about` is what results say besides: where, and beside how many others."""
        self._lm, self._out, self._about, self._marks, self._read = lm, out, about, marks, read
        self._cache = Cache(out / "cache")
        self._bench: Bench | None = None

    def run(self, job: Job) -> None:
        if not left([job], self._out):
            return
        bench = self._bench
        if bench is None or bench.teacher.document.name != job.document:
            # One document at a time: its KV and places to decode in are most of what is held.
            self._bench = bench = None
            # An engine is a cycle.
            gc.collect()
            self._bench = bench = Bench(self._lm, self._read(job.document), self._cache)
        began = time.perf_counter()
        result = bench.run(job, self._marks)
        seconds = time.perf_counter() - began
        write_atomically(self._out / f"{job.id}.json", {**result, **self._about, "seconds": round(seconds, 1)})
        last = result["marks"][-1]
        what = f"{job.document}, n/{job.compression}, seed {job.seed}: {job.start}, {job.mode}"
        measured = f"KL {last['heldout_kl']:.4f}, right {last['right'].count('1')}"
        print(f"{job.id}  {seconds:6.1f} s  {what}, {last['answer_tokens']} tokens: {measured}", flush=True)


def work(place: int, waiting: Sequence[Any], failed: Any, deadline: float, arguments: argparse.Namespace) -> None:
    """A process: one job after another until there is none, or it is too late for another."""
    device = arguments.device
    if device == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())
        device = f"cuda:{torch.cuda.current_device()}"
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // arguments.workers)))
    # TF32, where there is such a thing.
    torch.set_float32_matmul_precision("high")
    lm = FrozenLM.load(arguments.model, device=device, dtype=arguments.dtype)
    about = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "model": lm.spec.fingerprint,
        "workers": arguments.workers,
    }
    runner = Runner(lm, arguments.out, about, arguments.marks)
    for job in mine(waiting, place):
        if time.time() > deadline:
            break
        try:
            runner.run(job)
        # The others have nothing to do with it.
        except Exception:
            print(f"failed: {job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            failed.put(job.id)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def mine(waiting: Sequence[Any], place: int) -> Iterator[Job]:
    """Of a process's own document as long as there are any: another one's KV would have to be computed first."""
    own = place % len(waiting)
    for queue in (*waiting[own:], *waiting[:own]):
        yield from iter(queue.get, None)


def go_through(wanted: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Returns how many failed, those of processes that died included."""
    context = multiprocessing.get_context("spawn")
    failed = context.Queue()
    waiting = []
    for name in dict.fromkeys(job.document for job in wanted):
        waiting.append(context.Queue())
        for job in [*(job for job in wanted if job.document == name), *[None] * arguments.workers]:
            waiting[-1].put(job)
    deadline = time.time() + 60 * arguments.minutes
    processes = [
        context.Process(target=work, args=(place, waiting, failed, deadline, arguments))
        for place in range(arguments.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    # What nobody took would keep this process from ending.
    for queue in waiting:
        queue.cancel_join_thread()
    return sum(1 for _ in _all(failed)) + sum(process.exitcode != 0 for process in processes)


def _all(queue: Any) -> Iterator[str]:
    while not queue.empty():
        yield queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where results are, and go")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=get_args(Dtype))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no job is begun later")
    parser.add_argument("--model", type=Path, default=demo_model_directory())
    parser.add_argument(
        "--groups", nargs="+", default=list(GROUPS), choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--documents", nargs="+", default=DOCUMENTS, choices=[*DOCUMENTS, FINAL])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--marks", nargs="*", type=int, default=MARKS, help="answer tokens to measure after, beside the job's own"
    )
    parser.add_argument("--list", action="store_true", help="say what is left, and do nothing")
    parser.add_argument("--smoke", action="store_true", help="a few tiny jobs instead, a minute on a CPU")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    groups = {"smoke": SMOKE_CELLS} if arguments.smoke else {name: GROUPS[name] for name in arguments.groups}
    names, seeds = ((SMOKE,), (0,)) if arguments.smoke else (arguments.documents, arguments.seeds)
    for name, cells in groups.items():
        wanted = jobs(cells, names, seeds)
        print(f"{name}: {len(left(wanted, arguments.out))} of {len(wanted)} jobs left", flush=True)
    if not arguments.list:
        wanted = left(jobs([cell for cells in groups.values() for cell in cells], names, seeds), arguments.out)
        if num_failed := go_through(wanted, arguments):
            raise SystemExit(f"{num_failed} failed")


if __name__ == "__main__":
    main()
