"""Limits that both ends of a channel keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# What a message may hold of one thing; the rest is for what stands beside it.
MAX_CONTENT_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
# A streamed part stays well below the limit, so that its envelope fits too.
PART_BYTES = 1024 * 1024
# Tag and length of an item in a message.
_FRAME_BYTES = 5

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found again within a second or two rather than after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # With SO_REUSEPORT a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
)


def batches(items: Sequence[M], *, max_items: int = 0) -> Iterator[Sequence[M]]:
    """The items in order, as many at a time as one message holds, and at most `max_items` (0: any number).

    One that no message holds stands alone.
    """
    begin, num_bytes = 0, 0
    for index, item in enumerate(items):
        item_bytes = item.ByteSize() + _FRAME_BYTES
        if index > begin and (num_bytes + item_bytes > MAX_CONTENT_BYTES or index - begin == max_items):
            yield items[begin:index]
            begin, num_bytes = index, 0
        num_bytes += item_bytes
    if items:
        yield items[begin:]
