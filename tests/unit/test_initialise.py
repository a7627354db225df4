"""How a cartridge starts: keys that are moved, tokens that are kept, values that are refitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foundry.errors import CartridgeTooLong, FingerprintMismatch, InvalidArgument, ModelUnsupported, ShapeMismatch
from foundry.model.attention import compacting
from foundry.model.attention.compacting import CompactingAttention, Compaction
from foundry.model.attention.packed import PackedAttention
from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import compact, from_version, random_tokens
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation
from tests.tiny import Family, build_model, build_tokenizer

N, P = 90, 24
KEEP = Compaction(P, num_first=1, num_last=3)
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def load(family: Family = "llama", rope: str = "default") -> FrozenLM:
    model = build_model(family)
    config = model.config
    config.rope_parameters = ROPES[rope]
    scaled = type(model)(config)
    scaled.load_state_dict(model.state_dict())
    scaled.generation_config = model.generation_config
    return FrozenLM(scaled, build_tokenizer(), "blake3:" + "0" * 64)


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return load()


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(3, 380, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENT = ids(0, N)
REFERENCES = [ids(seed, 12 + seed) for seed in range(1, 9)]
OTHERS = [ids(seed, 20) for seed in range(20, 26)]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_turn_behind_moved_keys_is_the_same_turn(family: Family, rope: str) -> None:
    lm = load(family, rope)
    kv_L2GPD = lm.prefill(DOCUMENT)
    moved_L2GPD = KeyRotation.of(lm).move(kv_L2GPD, 41)
    turn = torch.tensor(REFERENCES[0])
    plan = PackedAttention([REFERENCES[0]], [kv_L2GPD], 512, lm.device)
    expected = lm.hidden(turn, plan.positions_T, plan)
    behind = PackedAttention([REFERENCES[0]], [moved_L2GPD], 512, lm.device)
    found = lm.hidden(turn, behind.positions_T + 41, behind)
    assert (found - expected).abs().max() < 1e-4
    # Left where they were they are not: the check can fail.
    still = lm.hidden(turn, plan.positions_T + 41, plan)
    assert (still - expected).abs().max() > 1e-2


def test_neighbouring_pairs_and_layers_without_positions_are_turned_as_such() -> None:
    lm = load()
    rotation = KeyRotation.of(lm)
    assert rotation.layers == ("halves", "halves")
    neighbours = KeyRotation(rotation.inv_freq, ("neighbours", None))
    kv_L2GPD = torch.randn(2, 2, 2, 5, 16)
    moved_L2GPD = neighbours.move(kv_L2GPD, 3)
    keys, turned = kv_L2GPD[:, 0], moved_L2GPD[:, 0]
    assert moved_L2GPD[:, 1].equal(kv_L2GPD[:, 1])
    angle = 3 * rotation.inv_freq
    assert torch.allclose(turned[0, ..., 0], keys[0, ..., 0] * angle[0].cos() - keys[0, ..., 1] * angle[0].sin())
    assert turned[1].equal(keys[1])
    setattr(lm.model.base_model, "rotary_emb", None)  # noqa: B010
    with pytest.raises(ModelUnsupported, match="rotary_emb"):
        KeyRotation.of(lm)


def test_keys_that_a_rotation_does_not_explain_are_refused(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = lm.hidden

    def with_dynamic_angles(ids_T: Tensor, positions_T: Tensor, plan: Any) -> Tensor:
        return hidden(ids_T, positions_T + positions_T.min() * 3, plan)

    monkeypatch.setattr(lm, "hidden", with_dynamic_angles)
    with pytest.raises(ModelUnsupported, match="more than a rotation"):
        KeyRotation.of(lm)


def test_all_tokens_are_the_documents_own_kv(lm: FrozenLM) -> None:
    found = compact(lm, DOCUMENT, REFERENCES, replace(KEEP, num_tokens=N))
    assert found.equal(lm.prefill(DOCUMENT))


@torch.no_grad()
def plan_of(lm: FrozenLM, references: Sequence[Sequence[int]], compaction: Compaction = KEEP) -> CompactingAttention:
    plan = CompactingAttention(references, lm.prefill(DOCUMENT), compaction)
    lm.hidden(torch.tensor([token for each in references for token in each]), plan.positions_T, plan)
    return plan


@torch.no_grad()
def test_references_go_through_the_model_as_behind_the_document(lm: FrozenLM) -> None:
    """Where every token is kept as it is, the forward of the compaction is the plain one."""
    as_it_is = replace(KEEP, num_tokens=N, refit=False, restore_mass=False)
    plan = CompactingAttention(REFERENCES, kv := lm.prefill(DOCUMENT), as_it_is)
    found = lm.hidden(torch.tensor([token for each in REFERENCES for token in each]), plan.positions_T, plan)
    expected = lm.packed_hidden(REFERENCES, [kv] * len(REFERENCES))
    assert (found - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_most_attended_tokens_are_kept(lm: FrozenLM) -> None:
    """Against attention weights written out, for the first layer."""
    captured: list[Tensor] = []

    class Captures(CompactingAttention):
        def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
            if layer == 0:
                captured.extend([q_HTD * scale, k_GTD])
            return super().attend(layer, q_HTD, k_GTD, v_GTD, scale)

    plan = Captures(REFERENCES[:2], kv := lm.prefill(DOCUMENT), KEEP)
    lm.hidden(torch.tensor([*REFERENCES[0], *REFERENCES[1]]), plan.positions_T, plan)
    q_HTD, k_GTD = captured
    mass_GN = torch.zeros(2, N, dtype=torch.float64)
    begin = 0
    for sequence in REFERENCES[:2]:
        for position in range(len(sequence)):
            for head in range(4):
                keys = torch.cat([kv[0, 0, head // 2], k_GTD[head // 2, begin : begin + position + 1]])
                weights = (keys @ q_HTD[head, begin + position]).softmax(0)
                mass_GN[head // 2] += weights[:N].double() ** 2
        begin += len(sequence)
    mass_GN[:, 0] = mass_GN[:, -3:] = torch.inf
    assert plan.indices[0].equal(mass_GN.topk(P).indices.sort().values)


def test_first_and_last_tokens_are_kept_in_order(lm: FrozenLM) -> None:
    for indices_GP in plan_of(lm, REFERENCES).indices:
        assert (indices_GP.diff() > 0).all()
        assert (indices_GP[:, 0] == 0).all()
        assert indices_GP[:, -3:].tolist() == [[N - 3, N - 2, N - 1]] * 2


def test_what_is_kept_does_not_depend_on_how_references_are_laid(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(lm, REFERENCES)
    monkeypatch.setattr(compacting, "_TILE_BYTES", 4 * 2 * N * 5)
    for other in (plan_of(lm, REFERENCES[::-1]), plan_of(lm, REFERENCES)):
        for layer in range(2):
            assert other.indices[layer].equal(plan.indices[layer])
            assert torch.allclose(other.kept[layer], plan.kept[layer], atol=1e-4)


@pytest.mark.parametrize("matching_steps", [0, 5])
def test_the_same_bits_again(matching_steps: int, lm: FrozenLM) -> None:
    keep = replace(KEEP, matching_steps=matching_steps)
    assert compact(lm, DOCUMENT, REFERENCES, keep).equal(compact(lm, DOCUMENT, REFERENCES, keep))


class Measured(CompactingAttention):
    """How far attention behind what another plan kept is from that behind the whole document, layer by layer."""

    def __init__(self, kept: Sequence[Tensor], document_L2GND: Tensor) -> None:
        super().__init__(OTHERS, document_L2GND, replace(KEEP, num_tokens=N, refit=False, sequential=False))
        self._behind = PackedAttention(OTHERS, [torch.stack(list(kept))] * len(OTHERS), 512, document_L2GND.device)
        self.errors: list[float] = []

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        expected = super().attend(layer, q_HTD, k_GTD, v_GTD, scale)
        found = self._behind.attend(layer, q_HTD, k_GTD, v_GTD, scale)
        self.errors.append((found - expected).norm().item())
        return expected


MANY_REFERENCES = [ids(seed, 20) for seed in range(100, 160)]


@torch.no_grad()
def errors(lm: FrozenLM, **changes: Any) -> list[float]:
    """Of attention behind what is kept, in every layer, for queries that nothing was fitted to."""
    plan = plan_of(lm, MANY_REFERENCES, replace(KEEP, **changes))
    measured = Measured(plan.kept, lm.prefill(DOCUMENT))
    lm.hidden(torch.tensor([token for each in OTHERS for token in each]), measured.positions_T, measured)
    return measured.errors


def test_refitted_values_are_better_for_queries_that_they_were_not_fitted_to(lm: FrozenLM) -> None:
    refitted, chosen = errors(lm, sequential=False), errors(lm, sequential=False, refit=False)
    assert all(better < 0.9 * worse for better, worse in zip(refitted, chosen, strict=True))


@pytest.mark.parametrize("sequential", [False, True])
def test_matched_kv_is_better_for_queries_that_it_was_not_matched_to(sequential: bool, lm: FrozenLM) -> None:
    refitted = errors(lm, sequential=sequential)
    matched = errors(lm, sequential=sequential, matching_steps=200)
    assert all(better < 0.9 * worse for better, worse in zip(matched, refitted, strict=True))


def test_without_matching_nothing_is_matched(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compacting, "match")
    unmatched = compact(lm, DOCUMENT, REFERENCES, KEEP)
    assert unmatched.equal(compact(lm, DOCUMENT, REFERENCES, replace(KEEP, matching_rate=1.0)))


@torch.no_grad()
def test_a_start_fitted_in_sequence_is_nearer_to_the_document(lm: FrozenLM) -> None:
    expected = lm.packed_hidden(OTHERS, [lm.prefill(DOCUMENT)] * len(OTHERS))

    def error(**changes: Any) -> float:
        kv = compact(lm, DOCUMENT, MANY_REFERENCES, replace(KEEP, **changes))
        return (lm.packed_hidden(OTHERS, [kv] * len(OTHERS)) - expected).norm().item()

    assert error() < error(refit=False, sequential=False)


def drawn(q_GRD: Tensor, key_GND: Tensor, own_lse_GR: Tensor) -> Tensor:
    """Share of each query's attention that goes to these keys, beside its own sequence."""
    return ((q_GRD @ key_GND.mT).logsumexp(-1) - own_lse_GR).sigmoid()


@pytest.mark.parametrize(("common", "at_most"), [(2.0, 0.2), (0.0, 1.05)])
def test_kept_keys_draw_as_much_attention_as_all_did(common: float, at_most: float) -> None:
    """Of queries that have a direction in common, as those of trained models do; of others about as before."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(2, 1, 16, generator=generator)
    q_GRD, others_GRD = (common * direction + torch.randn(2, 400, 16, generator=generator) for _ in range(2))
    q_GRD, others_GRD = 0.3 * q_GRD, 0.3 * others_GRD
    keys = torch.randn(2, 60, 16, generator=generator)
    own_lse = torch.full((2, 400), 3.0)
    rows = compacting._attend(compacting.Rows(q_GRD, own_lse, q_GRD, own_lse, q_GRD), keys, keys)
    kept = keys[:, :20]
    restored = compacting.restore_mass(kept, rows, num_first=1)
    assert torch.equal(restored[:, 0], kept[:, 0]), "the first token is never trained"
    wanted = drawn(others_GRD, keys, own_lse)
    before, after = (drawn(others_GRD, some, own_lse).sub(wanted).square().mean() for some in (kept, restored))
    assert after < at_most * before


@pytest.mark.parametrize("num_keys", [6, 15])
def test_values_are_those_of_ridge_least_squares(num_keys: int) -> None:
    """With more rows than keys and with fewer, which are solved in two forms."""
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(1, num_keys, 4, generator=generator) for _ in range(2))
    query, own, out = (torch.randn(1, 9, 4, generator=generator) for _ in range(3))
    own_lse = torch.randn(1, 9, generator=generator)
    found = compacting.refit(key, value, compacting.Rows(query, own_lse, own, own_lse, out), 0.1)

    scores = torch.cat([query[0] @ key[0].T, own_lse[0].unsqueeze(1)], dim=1).double().softmax(1)
    weights, own_weight = scores[:, :-1], scores[:, -1:]
    gram = weights.T @ weights
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(num_keys, dtype=torch.float64)
    target = out[0].double() - own_weight * own[0].double()
    expected = torch.linalg.solve(gram + ridge, weights.T @ target + ridge @ value[0].double())
    assert (found[0] - expected).abs().max() < 1e-4


def test_matching_is_adam_on_the_squared_error() -> None:
    """Of one row a group, so that whichever are drawn are the same; gradients by autograd, of attention written out."""
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    query, own, out = (torch.randn(2, 1, 4, generator=generator) for _ in range(3))
    own_lse = torch.randn(2, 1, generator=generator)
    compaction = Compaction(6, num_first=1, num_last=2, matching_steps=4, matching_rate=0.05)
    found = compacting.match(keys, values, compacting.Rows(query, own_lse, own, own_lse, out), compaction)

    expected = [each.clone().requires_grad_() for each in (keys, values)]
    optimizer = torch.optim.Adam(
        [{"params": [leaf], "lr": 0.05 * leaf.detach().square().mean().sqrt().item()} for leaf in expected]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for _ in range(4):
        key = torch.cat([keys[:, :1], expected[0][:, 1:]], dim=1)
        weights = torch.cat([query @ key.mT, own_lse.unsqueeze(-1)], dim=-1).softmax(-1)
        optimizer.zero_grad()
        (weights @ torch.cat([expected[1], own], dim=1) - out).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert found[0][:, 0].equal(keys[:, 0]), "the first token is never trained"
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("num_tokens", "references", "error", "says"),
    [
        (N + 1, REFERENCES, CartridgeTooLong, "only 90"),
        (4, REFERENCES, InvalidArgument, "closing tokens"),
        (P, [], InvalidArgument, "none of 0 references"),
        (P, [ids(1, 500)], InvalidArgument, "none of 1 references fits"),
    ],
)
def test_what_has_no_start_is_refused(
    num_tokens: int, references: list[list[int]], error: type[Exception], says: str, lm: FrozenLM
) -> None:
    with pytest.raises(error, match=says):
        compact(lm, DOCUMENT, references, replace(KEEP, num_tokens=num_tokens))


# Other starts


@torch.no_grad()
def test_random_tokens_are_as_they_stand_in_the_document(lm: FrozenLM) -> None:
    whole = lm.prefill(DOCUMENT)
    found = random_tokens(lm, DOCUMENT, 3, P, seed=4)
    assert found.shape == lm.spec.kv_shape(P)
    moved = KeyRotation.of(lm).move(whole, P - N)
    # Each is one of the document's, moved; the first and the closing ones are among them, in the document's order.
    places = [int((moved - found[:, :, :, [place]]).abs().amax((0, 1, 2, 4)).argmin()) for place in range(P)]
    assert places == sorted(set(places))
    assert [places[0], *places[-3:]] == [0, N - 3, N - 2, N - 1]
    assert torch.allclose(moved[:, :, :, places], found, atol=1e-5)
    assert torch.equal(found, random_tokens(lm, DOCUMENT, 3, P, seed=4))
    assert not torch.equal(found, random_tokens(lm, DOCUMENT, 3, P, seed=5))
    with pytest.raises(CartridgeTooLong):
        random_tokens(lm, DOCUMENT, 3, N + 1, seed=4)


def test_a_warm_start_is_the_version(lm: FrozenLM) -> None:
    version = TrainableCartridge(lm, torch.randn(lm.spec.kv_shape(P))).snapshot().to_bytes()
    start = from_version(lm, version, P)
    again = TrainableCartridge(lm, start).snapshot().to_bytes()
    assert again.digest() == version.digest()


def test_a_version_of_another_length_or_model_is_no_start(lm: FrozenLM) -> None:
    version = TrainableCartridge(lm, torch.randn(lm.spec.kv_shape(P))).snapshot().to_bytes()
    with pytest.raises(ShapeMismatch, match=f"has {P} tokens, the run asks for {P + 1}") as shape:
        from_version(lm, version, P + 1)
    other = replace(version, header=replace(version.header, model_fingerprint="blake3:" + "1" * 64))
    with pytest.raises(FingerprintMismatch, match="is of model blake3:1111") as model:
        from_version(lm, other, P)
    assert shape.value.field == model.value.field == "init_version"


def test_a_long_document_takes_no_matrix_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 tokens, the scores of 4,096 query rows of each kv head would be 3.3 GB; a tile is 16 MiB."""
    num_document = 100_000
    monkeypatch.setattr(compacting, "_TILE_BYTES", 16 * 1024**2)
    largest = 0
    # What is allocated goes through here: `@` makes the only tensors with a column for each token of the document.
    matmul = Tensor.__matmul__

    def watched(self: Tensor, other: Tensor) -> Tensor:
        nonlocal largest
        out = matmul(self, other)
        if out.shape[-1] == num_document:
            largest = max(largest, out.nbytes)
        return out

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    generator = torch.Generator().manual_seed(0)
    document = torch.randn(1, 2, 2, num_document, 16, generator=generator)
    compaction = Compaction(64, num_first=1, num_last=3, matching_steps=2)
    plan = CompactingAttention([[5] * 32] * 64, document, compaction)
    q_HTD, k_GTD, v_GTD = (torch.randn(heads, 64 * 32, 16, generator=generator) for heads in (4, 2, 2))
    out = plan.attend(0, q_HTD, k_GTD, v_GTD, 0.25)
    assert out.shape == (64 * 32, 4, 16)
    assert plan.kept[0].shape == (2, 2, 64, 16)
    assert 0 < largest <= 16 * 1024**2
