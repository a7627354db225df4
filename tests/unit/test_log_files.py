"""Logs of the local stack don't fill its disk."""

from __future__ import annotations

from pathlib import Path

from foundry.local.log_files import earlier, shorten


def test_a_log_that_is_large_goes_on_empty(tmp_path: Path) -> None:
    path = tmp_path / "rollout.log"
    shorten(path, 10)
    with path.open("ab", buffering=0) as sink:
        sink.write(b"line 1\n")
        shorten(path, 10)
        assert path.read_bytes() == b"line 1\n"
        assert not earlier(path).exists()
        sink.write(b"line 2\n")
        shorten(path, 10)
        # Whoever has it open appends to what is left.
        sink.write(b"line 3\n")
    assert (earlier(path).read_bytes(), path.read_bytes()) == (b"line 1\nline 2\n", b"line 3\n")
    assert earlier(path) == tmp_path / "rollout.log.1"
