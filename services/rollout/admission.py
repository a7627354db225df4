"""From a request on the wire to sequences for the engine: every limit is checked here, and names its field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from foundry.errors import ContextLengthExceeded, FingerprintMismatch, InvalidArgument, RopeUnsupported
from foundry.identity import check_digest
from foundry.model.info import ModelInfo
from foundry.model.template import ChatTemplate
from foundry.rpc.callers import check_caller
from foundry.rpc.limits import MAX_MESSAGE_BYTES
from foundry.v1 import common_pb2, rollout_pb2
from services.rollout.conversation import template_input
from services.rollout.copies import key_of
from services.rollout.engine import Grammar, SamplingParams, SequenceRequest
from services.rollout.external import check_external, refuse_batch
from services.rollout.sampling import check, check_plain, check_scored, read_sampling

MAX_CARTRIDGES = 16
# OpenAI's words, by which clients know the error whose code they don't read.
_MAXIMUM = "this model's maximum context length is"
# What a token takes in a completion: id, logprob and (generously) text, and for each alternative id and logprob.
_TOKEN_BYTES, _ALTERNATIVE_BYTES = 150, 10


@dataclass(frozen=True, slots=True)
class Admission:
    """A checked request: who asks, its cartridges as they were named, and one sequence per completion."""

    # Tenant and name: those who take turns.
    client: tuple[str, str]
    cartridges: Sequence[common_pb2.CartridgeId]
    sequences: Sequence[SequenceRequest]
    # Lower max_new_tokens rather than refuse.
    clamp: bool
    # Which of the request's fields the prompt is.
    prompt_field: str
    # The token that is sampled is not shown: only the prompt's logprobs were asked for.
    only_scored: bool = False
    # Each cartridge's keys stand behind the ones before it.
    shift: bool = False

    def clamped(self, room: int) -> Admission:
        """With at most `room` new tokens, if the request allows that and there is room for one."""
        if not self.clamp or not 1 <= room < self.sequences[0].sampling.max_new_tokens:
            return self
        sequences = [replace(each, sampling=replace(each.sampling, max_new_tokens=room)) for each in self.sequences]
        return replace(self, sequences=sequences)


class Admissions:
    """Checks requests for one model."""

    def __init__(
        self,
        info: ModelInfo,
        template: ChatTemplate,
        *,
        max_context_tokens: int,
        max_sequence_tokens: int,
        max_sequences: int,
        immovable: str = "",
        external: bool = False,
    ) -> None:
        """`max_context_tokens` is of cartridges, prompt and answer, `max_sequence_tokens` of the last two,
        `max_sequences` of one call; `immovable` says why keys of cartridges can't be moved, if they can't be.
        `external` is an engine that is a server of somebody else's."""
        self._spec, self._tokenizer = info.spec, info.tokenizer
        self._template = template
        self._max_context_tokens = max_context_tokens
        self.max_sequence_tokens = max_sequence_tokens
        self._max_sequences = max_sequences
        self._immovable = immovable
        self._external = external

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises InvalidArgument, FingerprintMismatch."""
        if not fingerprint:
            raise InvalidArgument("model_fingerprint is required", field="model_fingerprint")
        if fingerprint != self._spec.fingerprint:
            raise FingerprintMismatch(
                f"the caller means model {fingerprint}, the server has {self._spec.fingerprint}",
                field="model_fingerprint",
            )

    def check_batch(self, request: rollout_pb2.GenerateBatchRequest) -> list[Admission]:
        """Raises what `check` raises, with the request's place in the field, and PolicyUnproven."""
        if self._external:
            refuse_batch()
        if not request.requests:
            raise InvalidArgument("requests is empty", field="requests")
        num_sequences = sum(each.sampling.n or 1 for each in request.requests)
        if num_sequences > self._max_sequences:
            raise InvalidArgument(
                f"the batch has {num_sequences} sequences, the server takes {self._max_sequences} at a time",
                field="requests",
            )
        admissions = []
        for index, each in enumerate(request.requests):
            try:
                _check_same(each.caller, request.requests[0].caller)
                check_plain(each.sampling)
                admissions.append(self.check(each))
                _check_message(admissions[-1].sequences[0].sampling)
            except InvalidArgument as error:
                error.field = f"requests[{index}].{error.field}"
                raise
        return admissions

    def check(self, request: rollout_pb2.GenerateRequest, grammar: Grammar | None = None) -> Admission:
        """All that can be checked before the cartridges are known; `grammar` is the request's, compiled.

        Raises InvalidArgument, ContextLengthExceeded, FingerprintMismatch, RopeUnsupported.
        """
        self.check_fingerprint(request.model_fingerprint)
        shift = self._checked_shift(request)
        caller = check_caller(request.caller)
        if self._external:
            check_external(request)
        digests = _checked_digests(request.cartridges)
        num_completions = request.sampling.n or 1
        check(num_completions <= self._max_sequences, "n", num_completions, f"at most {self._max_sequences}")
        sampling = [
            replace(read_sampling(request.sampling, index, self._spec.vocab_size), grammar=grammar)
            for index in range(num_completions)
        ]
        prompt_field, prompt_ids = self._prompt_ids(request)
        check_scored(len(prompt_ids), sampling[0])
        sequences = [
            SequenceRequest(prompt_ids, digests, each, request.skip_prefix_cache, caller.tenant) for each in sampling
        ]
        admission = Admission(
            (caller.tenant, caller.client),
            request.cartridges,
            sequences,
            request.sampling.clamp_max_new_tokens,
            prompt_field,
            only_scored=not request.sampling.max_new_tokens,
            shift=shift,
        )
        return _fit(admission, self.max_sequence_tokens)

    def tokenized(self, request: rollout_pb2.TokenizeRequest) -> rollout_pb2.TokenizeResponse:
        """The ids of a prompt as `check` reads it, however many. Raises as `check` does."""
        self.check_fingerprint(request.model_fingerprint)
        ids = self._counted_ids(request)
        strings = self._tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else []
        return rollout_pb2.TokenizeResponse(ids=ids, token_strs=strings)

    def _counted_ids(self, request: rollout_pb2.TokenizeRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "conversation":
                messages, how = template_input(request.conversation)
                return (self._template.turn if request.behind_cartridge else self._template.prompt)(messages, how)
            case "text":
                plain = request.behind_cartridge or request.omit_special_tokens
                ids: list[int] = self._tokenizer(request.text, add_special_tokens=not plain)["input_ids"]
                return ids
            case _:
                raise InvalidArgument("set conversation or text", field="prompt")

    def detokenized(self, request: rollout_pb2.DetokenizeRequest) -> str:
        """Raises InvalidArgument, FingerprintMismatch."""
        self.check_fingerprint(request.model_fingerprint)
        self._check_vocabulary(request.ids, "tokens")
        if request.omit_special_tokens:
            ids = list(request.ids)
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return str(self._tokenizer.decode(list(request.ids)))

    def fit(self, admission: Admission, cartridge_tokens: Mapping[str, int]) -> Admission:
        """The request as the engine gets it. Raises ContextLengthExceeded."""
        digests = admission.sequences[0].digests
        lengths = [cartridge_tokens[digest] for digest in digests]
        fitting = _fit(admission, self._max_context_tokens, sum(lengths))
        if not fitting.shift:
            return fitting
        keys = tuple(map(key_of, digests, accumulate(lengths, initial=0)))
        return replace(fitting, sequences=[replace(each, digests=keys) for each in fitting.sequences])

    def _checked_shift(self, request: rollout_pb2.GenerateRequest) -> bool:
        """Whether keys are to be moved, which those of a single cartridge need not be."""
        if request.rope not in common_pb2.Rope.values():
            raise InvalidArgument(f"rope is {request.rope}, which this server does not know", field="rope")
        shift = request.rope == common_pb2.ROPE_SHIFT
        if shift and self._immovable and len(request.cartridges) > 1:
            raise RopeUnsupported(
                f"keys of cartridges can't be moved here: {self._immovable}; ask for them as they are, with rope keep",
                field="rope",
            )
        return shift

    def _prompt_ids(self, request: rollout_pb2.GenerateRequest) -> tuple[str, tuple[int, ...]]:
        """With the name of the field that they are from."""
        behind = bool(request.cartridges)
        may_be_long = request.ByteSize() > self.max_sequence_tokens
        match request.WhichOneof("prompt"):
            case "token_ids":
                field, ids = "token_ids", list(request.token_ids.ids)
            case "conversation":
                field = "conversation"
                messages, how = template_input(request.conversation)
                if may_be_long:
                    self._check_fewest(self._template.fewest(messages, how, behind_context=behind), field)
                ids = (self._template.turn if behind else self._template.prompt)(messages, how)
            case "text":
                field = "text"
                self._check_fewest(self._template.bound.fewest(request.text), field)
                # Behind a cartridge the beginning of the sequence is the cartridge's.
                ids = self._tokenizer(request.text, add_special_tokens=not behind)["input_ids"]
            case _:
                raise InvalidArgument("set token_ids, conversation or text", field="prompt")
        if not ids:
            raise InvalidArgument("the prompt has no tokens: it needs at least one", field=field)
        self._check_vocabulary(ids, field)
        return field, tuple(ids)

    def _check_vocabulary(self, ids: Sequence[int], field: str) -> None:
        if (largest := max(ids, default=0)) >= self._spec.vocab_size:
            raise InvalidArgument(
                f"token id {largest} is outside the vocabulary of {self._spec.vocab_size}", field=field
            )

    def _check_fewest(self, fewest: int, field: str) -> None:
        """Before the prompt is tokenised, which takes the longer the less it fits."""
        if fewest >= self.max_sequence_tokens:
            raise _too_long(f"a prompt of at least {fewest} tokens leaves", self.max_sequence_tokens, field)


def _fit(admission: Admission, max_tokens: int, num_prefix: int = 0) -> Admission:
    """Within so many tokens, those of cartridges before the prompt included. Raises ContextLengthExceeded."""
    num_prompt = len(admission.sequences[0].prompt_ids)
    admission = admission.clamped(max_tokens - num_prefix - num_prompt)
    num_new = admission.sequences[0].sampling.max_new_tokens
    if num_prefix + num_prompt + num_new <= max_tokens:
        return admission
    prompt = f"a prompt of {num_prompt} tokens"
    if num_prefix >= max_tokens:
        raise _too_long(f"cartridges of {num_prefix} tokens leave", max_tokens, "cartridges")
    if num_prefix:
        prompt = f"cartridges of {num_prefix} tokens and {prompt}"
    if num_prefix + num_prompt >= max_tokens:
        raise _too_long(f"{prompt} leave{'' if num_prefix else 's'}", max_tokens, admission.prompt_field)
    raise ContextLengthExceeded(
        f"{prompt} and max_new_tokens of {num_new} make {num_prefix + num_prompt + num_new}: "
        f"{_MAXIMUM} {max_tokens} tokens",
        field="sampling.max_new_tokens",
    )


def _too_long(what_leaves: str, max_tokens: int, field: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"{what_leaves} no room for an answer: {_MAXIMUM} {max_tokens} tokens", field=field)


def check_cartridge(cartridge: common_pb2.CartridgeId, field: str) -> str:
    """The digest, which is required: a name alone could mean other bytes tomorrow. Raises InvalidArgument."""
    return check_digest(cartridge.digest, field=f"{field}.digest")


def _checked_digests(cartridges: Sequence[common_pb2.CartridgeId]) -> tuple[str, ...]:
    if len(cartridges) > MAX_CARTRIDGES:
        raise InvalidArgument(
            f"there are {len(cartridges)} cartridges, a request takes {MAX_CARTRIDGES}", field="cartridges"
        )
    digests = tuple(check_cartridge(each, f"cartridges[{index}]") for index, each in enumerate(cartridges))
    if len(set(digests)) < len(digests):
        raise InvalidArgument("cartridges names the same digest twice", field="cartridges")
    return digests


def _check_same(caller: common_pb2.Caller, first: common_pb2.Caller) -> None:
    """A batch is decoded together, so it is one client's."""
    if caller != first:
        raise InvalidArgument("the requests of a batch have the same caller", field="caller")


def _check_message(sampling: SamplingParams) -> None:
    """A completion of a batch is one message."""
    num_bytes = sampling.max_new_tokens * (_TOKEN_BYTES + _ALTERNATIVE_BYTES * sampling.num_logprobs)
    if num_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"{sampling.max_new_tokens} tokens with {sampling.num_logprobs} alternatives each take up to {num_bytes} "
            f"bytes, a message holds {MAX_MESSAGE_BYTES}: ask for fewer, or stream with Generate",
            field="sampling.max_new_tokens",
        )
