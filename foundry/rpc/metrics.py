"""What gRPC servers report on /metrics."""

from prometheus_client import Counter, Histogram

SERVER_SECONDS = Histogram(
    "foundry_rpc_server_seconds",
    "Time to answer a gRPC call, streams until their end.",
    ["method", "code"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
SERVER_ERRORS = Counter(
    "foundry_rpc_server_errors", "Calls that ended with an error, by its type (`foundry.errors`).", ["method", "reason"]
)
