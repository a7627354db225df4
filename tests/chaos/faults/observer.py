"""The observer: keeps first-hand copies of what happened, and judges every step by them alone.

The invariant is that **every trained token was decoded with exactly the bytes that its digest names**. Three
things are known without asking the code under test: the bytes of every publication (copied before the store sees them,
hashed here), what every engine decoded (its cartridge's memory hashed at admission, its tokens noted as they leave
it), and what frozen model, document and bytes give when computed alone, offline. A sample that was trained on must
agree with all three; so must the teacher's signal that it was trained towards.

How a flipped bit in a reported logprob is judged: logprobs only enter the proof, not the loss, so a flip below the
proof's resolution changes nothing that is trained. What must hold for them is that the mean divergence of the batch
from what is computed here lies within the run's threshold. Ids and digest are compared exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from blake3 import blake3
from torch import Tensor

from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.model.lm import FrozenLM
from foundry.store import Manifest
from services.rollout.engine import SequenceRequest, TokenOutput
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal

# float32 sums in another order than the engine's batches and the teacher's packing take: 3e-6 at most was measured over
# two layers of width 64. Forty times that; other versions differ by 1e-2 and more.
TOLERANCE = 1e-4


class Observer:
    """Thread-safe enough: engines, trainer and event loop only add to its tables."""

    def __init__(self, lm: FrozenLM, document_ids: Sequence[int]) -> None:
        self._lm = lm
        self._document_kv = lm.prefill(document_ids)
        self.violations: list[str] = []
        self.trained_tokens = 0
        # digest -> KV [L, 2, G, P, D] of every publication that was tried.
        self._offered: dict[str, Tensor] = {}
        self._versions: dict[tuple[str, int], str] = {}
        # Highest version that a publisher was told of, by name.
        self._newest: dict[str, int] = {}
        # (digests, prompt, answer) -> logprobs, of every answer that an engine finished.
        self._decoded: dict[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]], list[float]] = {}

    def violation(self, text: str) -> None:
        self.violations.append(text)

    # What is published

    def offer(self, stored: CartridgeBytes) -> str:
        """A publisher is about to hand these bytes to the store."""
        header, data = stored.header, bytes(stored.data)
        digest = hash_cartridge(header, data)
        self._offered[digest] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(header.shape)
        return digest

    def published(self, digest: str, manifest: Manifest) -> None:
        """The store said that the bytes of `digest` are that version now."""
        if manifest.digest != digest:
            self.violation(f"published {digest}, the store says {manifest.id}")
        known = self._versions.get((manifest.name, manifest.version))
        newest = self._newest.get(manifest.name, 0)
        if known is None and manifest.version < newest:
            self.violation(f"{manifest.id} is new and its number lies below {newest}, which was published before")
        self.seen(manifest.name, manifest.version, manifest.digest)
        self._newest[manifest.name] = max(newest, manifest.version)

    def seen(self, name: str, version: int, digest: str) -> None:
        """Somebody read that the version means that digest."""
        known = self._versions.setdefault((name, version), digest)
        if known != digest:
            self.violation(f"{name}@{version} was {known} and is {digest} now")
        if digest not in self._offered:
            self.violation(f"{name}@{version} means {digest}, which nobody published")

    def newest(self, name: str) -> int:
        return self._newest.get(name, 0)

    # What is decoded

    def admitted(self, digest: str, kv_L2GPD: Tensor) -> None:
        """An engine is about to decode with this memory under that digest."""
        expected = self._offered.get(digest)
        if expected is None or not torch.equal(kv_L2GPD, expected):
            self.violation(f"the engine decodes with other bytes than those of {digest}")

    def decoded(self, request: SequenceRequest, outputs: Sequence[TokenOutput]) -> None:
        answer = tuple(output.token_id for output in outputs)
        logprobs = [output.logprob for output in outputs]
        self._decoded[outputs[-1].digests, request.prompt_ids, answer] = logprobs

    # What is trained on

    @torch.no_grad()
    def trained(
        self, prefix_L2GPD: Tensor, samples: Sequence[Sample], signals: Sequence[Signal], threshold: float
    ) -> None:
        """The optimiser has moved: these samples and signals moved it, and were proved against `prefix_L2GPD`."""
        digest = samples[0].digest
        published = self._offered.get(digest)
        if published is None or not torch.equal(prefix_L2GPD, published):
            self.violation(f"the step's proof did not use the bytes of {digest}")
        self.trained_tokens += sum(len(sample.answer_ids) for sample in samples)
        log_ratios = []
        for sample, signal in zip(samples, signals, strict=True):
            where = f"sample {list(sample.turn_ids)} of {sample.digest}"
            engine = self._decoded.get(((sample.digest,), tuple(sample.turn_ids), tuple(sample.answer_ids)))
            if engine is None or sample.digest not in self._offered:
                self.violation(f"trained on tokens that no engine decoded with their digest: {where}")
                continue
            _, offline_N = self._offline(sample, self._offered[sample.digest])
            if (difference := _largest(offline_N, torch.tensor(engine))) > TOLERANCE:
                self.violation(f"logprobs are {difference:.2g} from those of the claimed bytes: {where}")
            log_ratios.append(offline_N.double() - torch.tensor(sample.rollout_logprobs).double())
            teacher_NE, _ = self._offline(sample, self._document_kv)
            if not isinstance(signal, Tensor) or (difference := _largest(teacher_NE, signal)) > TOLERANCE:
                self.violation(f"the teacher's signal is {difference:.2g} from this sample's own: {where}")
        if log_ratios:
            log_ratio_N = torch.cat(log_ratios)
            kl = (log_ratio_N.exp() - 1 - log_ratio_N).mean().item()
            if not kl <= threshold * 1.01:
                self.violation(f"trained on logprobs whose divergence from {digest} is {kl:.3g}")

    def _offline(self, sample: Sample, kv_L2GPD: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, E] that predict the answer, and the answer's logprobs [N], behind one KV."""
        hidden_TE = self._lm.packed_hidden([sample.ids[:-1]], [kv_L2GPD])[sample.score_from - 1 :]
        logprobs_NV = self._lm.logits(hidden_TE).log_softmax(-1)
        return hidden_TE, logprobs_NV.gather(-1, torch.tensor(sample.answer_ids)[:, None]).squeeze(-1)


def hash_cartridge(header: CartridgeHeader, data: bytes) -> str:
    """The digest as the design page says it, written out once more."""
    canonical: Mapping[str, object] = asdict(header)
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"blake3:{blake3(text.encode() + data).hexdigest()}"


def _largest(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not a number."""
    if left.shape != right.shape:
        return float("inf")
    difference = (left - right).abs().max().item()
    return difference if difference == difference else float("inf")
