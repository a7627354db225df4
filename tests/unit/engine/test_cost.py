"""What a step does not do: compute a token twice, or copy a cartridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foundry.model.lm import FrozenLM
from tests.unit.engine.bench import CHUNK, Bench, make_kv, request


def test_every_token_goes_through_the_model_once(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(lm, max_sequences=3)
    bench.load("a", make_kv(lm, 64))
    widths: list[int] = []
    hidden = lm.hidden

    def counting(ids_T: Tensor, positions_T: Tensor, plan: Any) -> Tensor:
        widths.append(len(ids_T))
        return hidden(ids_T, positions_T, plan)

    monkeypatch.setattr(lm, "hidden", counting)
    requests = {index: request(10 + index, "a", seed=index, max_new_tokens=5 + index) for index in range(5)}
    bench.run(requests)
    # The last sampled token of a sequence never does.
    assert sum(widths) == sum(len(each.prompt_ids) + each.sampling.max_new_tokens - 1 for each in requests.values())
    assert max(widths) <= CHUNK + 3


class _LargeTensors(TorchDispatchMode):
    """Notes every operator whose output is large and lies in memory that is not known."""

    def __init__(self, known: Sequence[Tensor], num_elements: int) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_elements = num_elements
        self.found: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operators += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, Tensor)
                and tensor.numel() >= self.num_elements
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.found.append(str(func))
        return result


def test_neither_prompt_nor_decoding_copies_a_cartridge(lm: FrozenLM) -> None:
    bench = Bench(lm)
    kv = make_kv(lm, 300)
    bench.load("a", kv)
    bench.engine.admit({index: request(CHUNK // 4, "a", seed=index) for index in range(4)})
    loaded = bench.engine._cartridges["a"].kv_L2GPD
    known = [loaded, *lm.model.parameters(), bench.engine._kv.layers[0][0]]
    one_layer = kv[0, 0].numel()
    for _ in ("prefill", "decode"):
        with _LargeTensors(known, one_layer) as seen:
            assert len(bench.engine.step()) == 4
        assert seen.num_operators > 50
        assert seen.found == []
    # The detector sees a copy.
    with _LargeTensors(known, one_layer) as seen:
        torch.cat([loaded[0, 0], loaded[0, 0]], dim=1)
    assert seen.found
