"""Store and fleet: how fast versions move, how much is kept, and whether Redis, processes and GPUs are well."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    PROCESS,
    RATE,
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
    series,
    total_rate,
)

_STAGE = "foundry_store_stage_seconds"
# Names of the client library, which other programs serve too: only where a process of ours serves them.
_OURS = "* on (namespace, job, instance) group_left (service)"


def store_and_fleet() -> Dashboard:
    return dashboard(
        "foundry-store-and-fleet",
        "Store and fleet",
        "How long does a new version take, how much is kept, and are Redis, the processes and the GPUs well?",
        [
            Question("How long does a new version take?", _sync()),
            Question("How much is kept?", _kept(), 4),
            Question("Is Redis well?", _redis()),
            Question("Are the processes well?", _fleet()),
            Question("Are the GPUs used?", _gpus()),
        ],
        processes="foundry_build_info",
        label="Process",
    )


def _sync() -> Panels:
    return [
        *(
            series(
                f"{title}, by stage",
                "s",
                f"What takes the time of {what}? Mean of each stage. {beside}",
                query(mean(chosen(_STAGE, f'operation="{operation}",stage!="total"'), "stage"), "{{stage}}"),
                query(quantile(0.95, chosen(_STAGE, f'operation="{operation}",stage="total"')), "total p95"),
            )
            for operation, title, what, beside in (
                ("publish", "Publish", "publishing a version", "Send and hash go side by side."),
                ("fetch", "Fetch", "fetching a version", "Receive and hash go side by side; verify is what is left."),
            )
        ),
        series(
            "Versions",
            "ops",
            "How many versions come (kept in object storage or not) and are read (and where they were found)?",
            query(
                total_rate(chosen("foundry_store_versions_published_total"), "durable"),
                "published, durable {{durable}}",
            ),
            query(total_rate(chosen("foundry_store_versions_fetched_total"), "tier"), "fetched, {{tier}}"),
        ),
        series(
            "Bytes moved",
            "Bps",
            "How busy are Redis (hot) and object storage (durable)?",
            query(total_rate(chosen("foundry_store_bytes_total"), "direction", "tier"), "{{direction}} {{tier}}"),
        ),
        series(
            "Leases",
            "short",
            "Is what is in use kept from garbage collection? Leases on versions, by process.",
            query(chosen("foundry_store_leases"), PROCESS),
        ),
        figure(
            "Damaged copies",
            "short",
            "Were bytes refused that do not have their digest? Any is worth a look.",
            f"sum(increase({chosen('foundry_store_digest_mismatches_total')}[$__range]))",
            bad_from=1,
        ),
    ]


def _kept() -> Panels:
    return [
        series(
            "Bytes of cartridges",
            "bytes",
            "How much is in Redis (hot) and in object storage (durable)?",
            query(f"max({anywhere('foundry_store_hot_bytes')})", "hot"),
            query(f"max({anywhere('foundry_store_durable_bytes')})", "durable"),
        ),
        series(
            "Versions kept",
            "short",
            "How many versions are in Redis and in object storage?",
            query(f"max({anywhere('foundry_store_hot_versions')})", "hot"),
            query(f"max({anywhere('foundry_store_durable_versions')})", "durable"),
        ),
        figure("Cartridges", "short", "How many names are there?", f"max({anywhere('foundry_store_names')})"),
        figure(
            "Age of these figures",
            "s",
            "When did a gateway last look at the store? Old figures mean that no gateway can.",
            f"time() - max({anywhere('foundry_store_census_timestamp_seconds')})",
            bad_from=600,
        ),
    ]


def _redis() -> Panels:
    return [
        series(
            "Redis answers",
            "bool_yes_no",
            "Whom does Redis answer? Whether it answered the last command, by process.",
            query(chosen("foundry_store_redis_up"), PROCESS),
        ),
        series(
            "Memory of Redis",
            "bytes",
            "Is Redis almost full? When it is nothing can be published. Without a limit there is no second line.",
            query(f"max({anywhere('foundry_store_redis_used_bytes')})", "used"),
            query(f"max({anywhere('foundry_store_redis_max_bytes')}) > 0", "limit"),
        ),
        series(
            "Time of a command",
            "s",
            "Is Redis slow? One atomic step, the way there and back included.",
            *quantiles(chosen("foundry_store_redis_seconds")),
        ),
        series(
            "Errors of Redis",
            "ops",
            "Why does it fail? Away, refused or full.",
            query(total_rate(chosen("foundry_store_redis_errors_total"), "reason"), "{{reason}}"),
        ),
        series(
            "Returns and rebuilds",
            "short",
            "Was Redis away, did it lose its data? After a loss a process restores the pointers.",
            query(f"sum(increase({chosen('foundry_store_redis_returns_total')}{RATE}))", "answered again"),
            query(f"sum(increase({chosen('foundry_store_rebuilds_total')}{RATE}))", "pointers restored"),
        ),
        series(
            "Runs",
            "short",
            "Do runs wait for a worker?",
            query(f"max by (state) ({anywhere('foundry_store_runs')})", "{{state}}"),
        ),
    ]


def _fleet() -> Panels:
    ours = f"{_OURS} {chosen('foundry_build_info')}"
    return [
        series(
            "Processes",
            "short",
            "What runs, and in which version? Two versions of a service at once: an update is under way.",
            query(f"count by (service, version) ({chosen('foundry_build_info')})", "{{service}} {{version}}"),
        ),
        series(
            "Processes that answer",
            "percentunit",
            "Does anything not answer Prometheus? Of the targets in jobs that are ours.",
            query(
                f"avg by (job) ({chosen('up')} "
                f"and on (namespace, job) last_over_time({chosen('foundry_build_info')}[1d]))",
                "{{job}}",
            ),
            maximum=1,
        ),
        series(
            "Memory",
            "bytes",
            "Does a process grow? Resident memory.",
            query(f"{chosen('process_resident_memory_bytes')} {ours}", "{{service}} {{instance}}"),
        ),
        series(
            "CPU",
            "short",
            "Who needs the CPUs? Cores in use.",
            query(f"rate({chosen('process_cpu_seconds_total')}{RATE}) {ours}", "{{service}} {{instance}}"),
        ),
        series(
            "Open files",
            "short",
            "Are connections left open?",
            query(f"{chosen('process_open_fds')} {ours}", "{{service}} {{instance}}"),
        ),
        series(
            "gRPC calls",
            "reqps",
            "What do the services ask of each other, and how does it end?",
            query(total_rate(chosen("foundry_rpc_server_seconds_count"), "method", "code"), "{{method}} {{code}}"),
        ),
        series(
            "Time of gRPC calls",
            "s",
            "Which call is slow? 95th percentile, streams until their end.",
            query(quantile(0.95, chosen("foundry_rpc_server_seconds"), "method"), "{{method}}"),
        ),
        series(
            "gRPC errors",
            "ops",
            "What goes wrong between the services?",
            query(total_rate(chosen("foundry_rpc_server_errors_total"), "job", "reason"), "{{job}} {{reason}}"),
        ),
    ]


def _gpus() -> Panels:
    return [
        series(
            "Memory of GPUs",
            "percentunit",
            "Is a GPU full? In use by whatever process.",
            query(
                f"{chosen('foundry_gpu_memory_used_bytes')} / {chosen('foundry_gpu_memory_bytes')}",
                f"{PROCESS} GPU {{{{device}}}}",
            ),
            limit=0.95,
            maximum=1,
        ),
        series(
            "Memory of GPUs in use",
            "bytes",
            "How much does each process' GPU hold?",
            query(chosen("foundry_gpu_memory_used_bytes"), f"{PROCESS} GPU {{{{device}}}}"),
        ),
        series(
            "Utilisation of GPUs",
            "percentunit",
            "Is a GPU idle? Share of the last second in which a kernel ran.",
            query(chosen("foundry_gpu_utilization_ratio"), f"{PROCESS} GPU {{{{device}}}}"),
            maximum=1,
        ),
    ]
