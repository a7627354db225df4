"""What is asked of an external server, whose sampling is its own and which proves nothing."""

from __future__ import annotations

from foundry.errors import InvalidArgument, PolicyUnproven
from foundry.v1 import rollout_pb2

# What changes the distribution or the prompt's own scores, which the server takes none of.
_NOT_THERE = (
    *("top_k", "min_tokens", "min_p", "logit_bias", "presence_penalty", "frequency_penalty", "grammar"),
    "prompt_logprobs",
)
_NEUTRAL = {"top_p": 1.0, "repetition_penalty": 1.0}


def check_external(request: rollout_pb2.GenerateRequest) -> None:
    """Raises InvalidArgument for what the server can't do, or would do otherwise than asked without saying so."""
    sampling = request.sampling
    for descriptor, value in sampling.ListFields():
        name = descriptor.name
        if name in _NOT_THERE or value != _NEUTRAL.get(name, value):
            raise _refused(f"takes no {name}", f"sampling.{name}")
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if temperature not in (0.0, 1.0):
        raise _refused(
            "tells logprobs at the temperature it samples at, so that only temperatures 0 and 1 have the model's own",
            "sampling.temperature",
        )
    if temperature and sampling.HasField("seed"):
        raise _refused("takes no seed: leave it out, or set temperature to 0", "sampling.seed")
    if request.skip_prefix_cache:
        raise _refused("can't be told to compute a prompt anew", "skip_prefix_cache")
    if len(request.cartridges) > 1:
        raise _refused("puts several cartridges in an order of its own: name one", "cartridges")
    if request.caller.tenant:
        raise _refused("shares its prefix cache among all tenants", "caller.tenant")


def refuse_batch() -> None:
    """Batches are what is trained on. Raises PolicyUnproven."""
    raise PolicyUnproven(
        "this rollout server asks an external Tokasaurus server, which does not say which bytes it decoded with: it "
        "takes no batches, and nothing is trained on its answers. Train with rollout servers of the engine torch or "
        "vllm",
        field="requests",
    )


def _refused(what: str, field: str) -> InvalidArgument:
    return InvalidArgument(f"the Tokasaurus server that decodes here {what}", field=field)
