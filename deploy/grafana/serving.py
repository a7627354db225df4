"""Serving: are people answered, do the rollout servers keep up, and are the cartridges where they are needed."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    PROCESS,
    Panels,
    Question,
    anywhere,
    chosen,
    dashboard,
    figure,
    mean,
    quantile,
    quantiles,
    query,
    ratio,
    series,
    total_rate,
)

# Without probes and scrapes, which would outnumber people.
_API = 'route=~"/v1/.*"'
_REQUESTS = anywhere("foundry_gateway_requests_total", _API)
_FAILED_REQUESTS = anywhere("foundry_gateway_requests_total", _API, 'status=~"5.."')


def serving() -> Dashboard:
    return dashboard(
        "foundry-serving",
        "Serving",
        "Are people answered in time, do the rollout servers keep up, and are cartridges in memory when asked for?",
        [
            Question("Are people answered, and in time?", _answered(), 4),
            Question("Is the gateway well?", _gateway(), 4),
            Question("Do the rollout servers keep up?", _keeping_up(), 4),
            Question("What are the sequences like?", _sequences(), 4),
            Question("Is there KV memory left?", _kv()),
            Question("Are the cartridges where they are needed?", _residency()),
            Question("What goes wrong?", _errors(), 4),
        ],
        processes="vllm:num_requests_running",
        label="Rollout server",
    )


def _answered() -> Panels:
    return [
        series(
            "Requests",
            "reqps",
            "How much is asked of the gateway, and is it answered? 4xx is the caller's, 5xx ours.",
            query(total_rate(_REQUESTS, "status"), "{{status}}"),
            stacked=True,
        ),
        series(
            "Share of 5xx",
            "percentunit",
            "How many requests fail that should not?",
            query(
                f"({total_rate(_FAILED_REQUESTS)} or vector(0)) / ({total_rate(_REQUESTS)} > 0)",
                "5xx",
            ),
            limit=0.05,
        ),
        series(
            "Time to first token",
            "s",
            "How long do people wait until they see something? At the gateway, streamed or not.",
            *quantiles(anywhere("foundry_gateway_time_to_first_token_seconds")),
        ),
        series(
            "Time to answer",
            "s",
            "Which route is slow? Streams until their end, 95th percentile.",
            query(quantile(0.95, anywhere("foundry_gateway_request_seconds", _API), "route"), "{{route}}"),
        ),
    ]


def _gateway() -> Panels:
    return [
        series(
            "Tokens of answers",
            "tok/s",
            "How much do people get? Of answers that were completed.",
            query(total_rate(anywhere("foundry_gateway_generation_tokens_total")), "generated"),
            query(total_rate(anywhere("foundry_gateway_prompt_tokens_total")), "prompts"),
        ),
        series(
            "Completions in flight",
            "percentunit",
            "Is a gateway full? Of the most that it takes; more are refused with 429.",
            query(
                f"{anywhere('foundry_gateway_completions_in_flight')} "
                f"/ {anywhere('foundry_gateway_max_completions_in_flight')}",
                PROCESS,
            ),
            limit=0.9,
            maximum=1,
        ),
        series(
            "Rollout servers",
            "short",
            "Does every gateway reach every server? What serves metrics, and what the gateway with fewest reaches.",
            query(f"count({anywhere('foundry_kv_slots')})", "alive"),
            query(f"min({anywhere('foundry_gateway_rollouts_reachable')})", "reached"),
        ),
        figure(
            "Answers withheld",
            "short",
            "Did a server answer with other cartridges than asked for? Must be 0: no such answer reaches a user.",
            f"sum(increase({anywhere('foundry_gateway_identity_mismatches_total')}[$__range]))",
            bad_from=1,
        ),
    ]


def _keeping_up() -> Panels:
    return [
        series(
            "Sequences running",
            "short",
            "How large are the batches?",
            query(chosen("vllm:num_requests_running"), PROCESS),
            stacked=True,
        ),
        series(
            "Sequences waiting",
            "short",
            "Is there a queue? One that only grows needs another server.",
            query(chosen("vllm:num_requests_waiting"), PROCESS),
            stacked=True,
        ),
        series(
            "Time in the queue",
            "s",
            "How long does a sequence wait for its slot, once its cartridges are there?",
            *quantiles(chosen("vllm:request_queue_time_seconds")),
        ),
        series(
            "Time to first token, rollout",
            "s",
            "Is it the server that makes people wait? From the call's arrival, its cartridges' transfer included.",
            *quantiles(chosen("vllm:time_to_first_token_seconds")),
        ),
        series(
            "Tokens decoded",
            "tok/s",
            "How much do the servers do, for people and for training?",
            query(total_rate(chosen("vllm:generation_tokens_total"), "pod", "instance"), PROCESS),
        ),
        series(
            "Prompt tokens",
            "tok/s",
            "How much is prefilled? Prompts whose first token was sampled.",
            query(total_rate(chosen("vllm:prompt_tokens_total"), "pod", "instance"), PROCESS),
        ),
        series(
            "Between tokens",
            "s",
            "Does the text flow? From one token of a sequence to the next.",
            *quantiles(chosen("vllm:inter_token_latency_seconds")),
        ),
        series(
            "Where a sequence's time goes",
            "s",
            "Is it queue, prefill or decoding? Mean of each, one on the other.",
            query(mean(chosen("vllm:request_queue_time_seconds")), "queue"),
            query(mean(chosen("vllm:request_prefill_time_seconds")), "prefill"),
            query(mean(chosen("vllm:request_decode_time_seconds")), "decode"),
            stacked=True,
        ),
    ]


def _sequences() -> Panels:
    return [
        series(
            "How sequences end",
            "ops",
            "By themselves (stop), at the token limit (length), or because the caller left (abort)?",
            query(total_rate(chosen("vllm:request_success_total"), "finished_reason"), "{{finished_reason}}"),
            stacked=True,
        ),
        series(
            "Whole sequence",
            "s",
            "How long from the call's arrival to its last token?",
            *quantiles(chosen("vllm:e2e_request_latency_seconds")),
        ),
        series(
            "Length of prompts and answers",
            "short",
            "What is asked for? Mean tokens of sequences that ended.",
            query(mean(chosen("vllm:request_prompt_tokens")), "prompt"),
            query(mean(chosen("vllm:request_generation_tokens")), "answer"),
        ),
        series(
            "Tokens a step",
            "short",
            "Is the device used well? Mean tokens of one step, prompts included.",
            query(mean(chosen("vllm:iteration_tokens_total")), "tokens"),
        ),
    ]


def _kv() -> Panels:
    queries, hits = chosen("vllm:prefix_cache_queries_total"), chosen("vllm:prefix_cache_hits_total")
    return [
        series(
            "KV slots and memory held",
            "percentunit",
            "Can more sequences run at once? At 100 % of either the next one waits.",
            query(f"{chosen('foundry_kv_slots_used')} / {chosen('foundry_kv_slots')}", f"{PROCESS} slots"),
            query(chosen("vllm:kv_cache_usage_perc"), f"{PROCESS} memory"),
            limit=0.95,
            maximum=1,
        ),
        series(
            "KV memory",
            "bytes",
            "Are slots longer than they need be? What sequences have filled, of what is set aside.",
            query(f"sum({chosen('foundry_kv_used_bytes')})", "filled"),
            query(f"sum({chosen('foundry_kv_bytes')})", "set aside"),
        ),
        series(
            "Prefix cache",
            "percentunit",
            "Is the KV of earlier turns reused? Share of prompt tokens: of those looked up, and of people's prompts.",
            query(ratio(hits, queries), "rollout"),
            query(
                ratio(anywhere("foundry_gateway_cached_tokens_total"), anywhere("foundry_gateway_prompt_tokens_total")),
                "gateway",
            ),
            maximum=1,
        ),
    ]


def _residency() -> Panels:
    return [
        series(
            "Resident cartridges",
            "short",
            "How many can be asked for without a wait, by tier?",
            query(f"sum by (tier) ({chosen('foundry_resident_cartridges')})", "{{tier}}"),
        ),
        series(
            "Budget used",
            "percentunit",
            "Does another cartridge fit, by tier? At 100 % it evicts one.",
            query(
                f"sum by (tier) ({chosen('foundry_resident_cartridge_bytes')}) "
                f"/ (sum by (tier) ({chosen('foundry_cartridge_budget_bytes')}) > 0)",
                "{{tier}}",
            ),
            maximum=1,
        ),
        series(
            "Found in",
            "ops",
            "Where are the cartridges that are asked for? The store costs a transfer; every new version does once.",
            query(total_rate(chosen("foundry_cartridge_hits_total"), "tier"), "{{tier}}"),
            stacked=True,
        ),
        series(
            "Evictions",
            "ops",
            "Is memory too small for what is in use? With misses that go on: raise the budget or add a server.",
            query(total_rate(chosen("foundry_cartridge_evictions_total"), "tier"), "{{tier}}"),
        ),
        series(
            "Time to fetch",
            "s",
            "What does a miss cost? From the store, verified.",
            *quantiles(chosen("foundry_cartridge_fetch_seconds")),
        ),
        series(
            "Prefetches",
            "ops",
            "Are new versions there before they are asked for? Dropped: the queue of hints was full.",
            query(total_rate(chosen("foundry_cartridge_prefetches_total"), "result"), "{{result}}"),
        ),
    ]


def _errors() -> Panels:
    return [
        series(
            "Errors at the gateway",
            "ops",
            "What do callers get instead of an answer?",
            query(total_rate(anywhere("foundry_gateway_errors_total"), "reason"), "{{reason}}"),
        ),
        series(
            "Errors of the rollout servers",
            "ops",
            "What do the servers refuse?",
            query(total_rate(chosen("foundry_rpc_server_errors_total"), "method", "reason"), "{{method}} {{reason}}"),
        ),
        series(
            "Attempts repeated by the gateway",
            "ops",
            "Do servers go away? The gateway asks another one.",
            query(total_rate(anywhere("foundry_gateway_rollout_retries_total")), "repeated"),
        ),
        series(
            "Cartridges that could not be loaded",
            "ops",
            "Is there one that does not fit, or does the store not answer?",
            query(total_rate(chosen("foundry_cartridge_load_errors_total"), "pod", "instance"), PROCESS),
        ),
    ]
