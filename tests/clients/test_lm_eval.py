"""lm-eval's loglikelihoods through the gateway, against `transformers` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from foundry.model.cartridge import Cartridge
from tests.clients.conftest import BASE, CARTRIDGE, Site

TASK = "treaty"
ROWS = [
    {"question": f"What was signed {when}?", "choices": ["the treaty, é 北", "the price of grain", "a"], "answer": 0}
    for when in ("in the spring", "by the president", "at the harbour, and why")
]


def write_task(directory: Path) -> None:
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    # JSON is YAML.
    (directory / "task.yaml").write_text(json.dumps(task))


def loglikelihood(model: Path, cartridge: Cartridge | None, context: str, continuation: str) -> tuple[float, bool]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    num_context = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation)["input_ids"]
    past = DynamicCache()
    begin = 0
    if cartridge is not None:
        begin = cartridge.kv_L2GPD.shape[3]
        for layer, (k_GPD, v_GPD) in enumerate(cartridge.kv_L2GPD):
            past.update(k_GPD[None], v_GPD[None], layer)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(
            torch.tensor([ids]), past_key_values=past, position_ids=torch.arange(begin, begin + len(ids))[None]
        ).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)[num_context - 1 : -1]
    chosen = logprobs.gather(1, torch.tensor(ids[num_context:])[:, None])[:, 0]
    return float(chosen.sum()), bool((chosen == logprobs.amax(dim=-1)).all())


@pytest.mark.parametrize("model", [BASE, CARTRIDGE])
def test_loglikelihoods_are_those_of_transformers(
    site: Site, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    results: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"{site.url}/completions",
            "tokenizer": str(site.stack.model),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 2,
        },
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = results["samples"][TASK]
    assert len(samples) == len(ROWS)
    cartridge = site.cartridge if model == CARTRIDGE else None
    for sample in samples:
        for (context, continuation), told in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            expected, greedy = loglikelihood(site.stack.model, cartridge, context, continuation)
            assert float(told[0]) == pytest.approx(expected, abs=1e-3)
            assert str(told[1]) == str(greedy)
