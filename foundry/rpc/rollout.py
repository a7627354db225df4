"""The client of the rollout service: answers, and the check that they are of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from foundry.errors import AlignmentError
from foundry.identity import answer_checksum
from foundry.rpc.answers import Answer, Prompt
from foundry.rpc.channel import decoded
from foundry.rpc.limits import batches
from foundry.rpc.pods import Pod, Pods
from foundry.store.names import CartridgeId
from foundry.tasks import end
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

_RESIDENT_TIMEOUT_SECONDS = 5.0


class RolloutClient:
    """All rollout servers of one model; each batch is dealt out in turn to those that are there when it is asked."""

    def __init__(
        self,
        pods: Pods,
        model_fingerprint: str,
        template_digest: str,
        timeout_seconds: float,
        *,
        caller: common_pb2.Caller | None = None,
    ) -> None:
        """`timeout_seconds` is of one call, of which a batch may take several. `pods` are closed with it."""
        self._pods = pods
        self._model_fingerprint = model_fingerprint
        self._template_digest = template_digest
        self._timeout_seconds = timeout_seconds
        self._caller = caller
        # How many sequences a call to this server may have, and the pod's `silent_since` when it said so.
        self._max_sequences: WeakKeyDictionary[Pod, tuple[int, float]] = WeakKeyDictionary()

    async def sample(
        self, prompts: Sequence[Prompt], policy: CartridgeId, *, temperature: float, max_new_tokens: int
    ) -> list[Answer]:
        """One answer to each prompt, in order, every token of it decoded with the policy's digest.

        Nothing is reused from earlier calls, so that the same call gives the same bits.
        Raises AlignmentError if an answer is not the policy's, and what the server raised.
        """
        sampling = rollout_pb2.Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        return await self._generate(prompts, [policy], sampling, skip_prefix_cache=True)

    async def ask_base(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """Answers of the plain model, with no cartridge: the teacher's own, where the document is in the prompt."""
        sampling = rollout_pb2.Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop=stop)
        return await self._generate(prompts, [], sampling, skip_prefix_cache=False)

    async def close(self) -> None:
        await self._pods.close()

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        cartridges: Sequence[CartridgeId],
        sampling: rollout_pb2.Sampling,
        *,
        skip_prefix_cache: bool,
    ) -> list[Answer]:
        requests = [self._request(prompt, cartridges, sampling, skip_prefix_cache) for prompt in prompts]
        pods = await self._pods.reachable()
        shares = [requests[place :: len(pods)] for place in range(len(pods))]
        asked = [
            asyncio.create_task(self._ask(pod, share, cartridges))
            for pod, share in zip(pods, shares, strict=True)
            if share
        ]
        try:
            answered = await asyncio.gather(*asked)
        finally:
            # When one fails: what is asked again must not be decoded beside what is left of this, for other bits.
            await end(*asked)
        dealt = [iter(share) for share in answered]
        return [next(dealt[index % len(pods)]) for index in range(len(prompts))]

    async def _ask(
        self, pod: Pod, requests: Sequence[rollout_pb2.GenerateRequest], cartridges: Sequence[CartridgeId]
    ) -> list[Answer]:
        """In as many calls, one after the other, as the server and the size of messages ask for."""
        answers: list[Answer] = []
        with pod.calling() as channel:
            stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
            for some in batches(requests, max_items=await self._places(pod, stub)):
                answers += await self._call(pod, stub, some, cartridges)
        return answers

    async def _places(self, pod: Pod, stub: rollout_pb2_grpc.RolloutAsyncStub) -> int:
        """How many sequences one call may have; asked again when the server was away, and may be another."""
        known = self._max_sequences.get(pod)
        if known is None or known[1] != pod.silent_since:
            answer = await stub.Resident(rollout_pb2.ResidentRequest(), timeout=_RESIDENT_TIMEOUT_SECONDS)
            known = self._max_sequences[pod] = decoded(answer, pod.name).max_sequences, pod.silent_since
        return known[0]

    async def _call(
        self,
        pod: Pod,
        stub: rollout_pb2_grpc.RolloutAsyncStub,
        requests: Sequence[rollout_pb2.GenerateRequest],
        cartridges: Sequence[CartridgeId],
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        batch = rollout_pb2.GenerateBatchRequest(requests=requests)
        async for message in stub.GenerateBatch(batch, timeout=self._timeout_seconds):
            response = decoded(message, pod.name)
            if response.request_index >= len(requests):
                raise AlignmentError(f"{pod.name} answered prompt {response.request_index} of {len(requests)}")
            self._check(response.completion, requests[response.request_index], cartridges, pod.name)
            answers[response.request_index] = _answer(response.completion, pod.address)
        if sorted(answers) != list(range(len(requests))):
            raise AlignmentError(f"{pod.name} answered {len(answers)} of {len(requests)} prompts")
        return [answers[index] for index in range(len(requests))]

    def _request(
        self,
        prompt: Prompt,
        cartridges: Sequence[CartridgeId],
        sampling: rollout_pb2.Sampling,
        skip_prefix_cache: bool,
    ) -> rollout_pb2.GenerateRequest:
        seeded = rollout_pb2.Sampling(seed=prompt.seed)
        seeded.MergeFrom(sampling)
        return rollout_pb2.GenerateRequest(
            model_fingerprint=self._model_fingerprint,
            token_ids=common_pb2.TokenIds(ids=prompt.ids),
            cartridges=[
                common_pb2.CartridgeId(name=each.name, version=each.version, digest=each.digest) for each in cartridges
            ],
            sampling=seeded,
            skip_prefix_cache=skip_prefix_cache,
            caller=self._caller,
        )

    def _check_identity(self, what: str, found: str, asked: str, peer: str) -> None:
        if found != asked:
            raise AlignmentError(f"{peer} answered with {what} {found or 'none'} when {asked or 'none'} was asked")

    def _check(
        self,
        completion: rollout_pb2.Completion,
        request: rollout_pb2.GenerateRequest,
        cartridges: Sequence[CartridgeId],
        peer: str,
    ) -> None:
        identity = completion.identity
        self._check_identity("model", identity.model_fingerprint, self._model_fingerprint, peer)
        self._check_identity("template", identity.template_digest, self._template_digest, peer)
        found = ", ".join(each.digest for each in identity.cartridges)
        self._check_identity("cartridges", found, ", ".join(each.digest for each in cartridges), peer)
        if identity.rope == common_pb2.ROPE_SHIFT:
            raise AlignmentError(f"{peer} answered behind cartridges whose keys it moved, when none were to be")
        if not completion.ids or len(completion.ids) != len(completion.logprobs):
            raise AlignmentError(
                f"{peer} answered with {len(completion.ids)} tokens and {len(completion.logprobs)} logprobs"
            )
        if completion.finish_reason not in (rollout_pb2.FINISH_REASON_STOP, rollout_pb2.FINISH_REASON_LENGTH):
            # A number, because one that was damaged may have no name.
            raise AlignmentError(f"{peer} sent an answer that did not end: finish_reason {completion.finish_reason}")
        if completion.checksum != answer_checksum(request.token_ids.ids, completion.ids, completion.logprobs):
            raise AlignmentError(f"{peer} sent an answer that was damaged, or is another prompt's")


def _answer(completion: rollout_pb2.Completion, server: str) -> Answer:
    return Answer(
        ids=list(completion.ids),
        logprobs=list(completion.logprobs),
        text=completion.text,
        truncated=completion.finish_reason == rollout_pb2.FINISH_REASON_LENGTH,
        server=server,
    )
