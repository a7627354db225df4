"""Whoever writes to standard error, each line is one JSON object; and what is wrong with telemetry is told at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from foundry.errors import ExtraMissing
from foundry.settings import ServiceSettings
from foundry.telemetry.log_limit import MAX_LINES, WINDOW_SECONDS
from foundry.telemetry.traces import configure_traces, current_traceparent, links_to

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def run(program: str, log_format: str = "json") -> tuple[int, list[str]]:
    prologue = f"from foundry.telemetry import configure_logs\nconfigure_logs('teacher', 'info', '{log_format}')\n"
    done = subprocess.run([sys.executable, "-c", prologue + program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.splitlines()


def run_json(program: str) -> tuple[int, list[dict[str, Any]]]:
    status, lines = run(program)
    found = [json.loads(line) for line in lines]
    for line in found:
        assert line["service"] == "teacher"
        assert {"event", "level", "timestamp", "logger"} <= line.keys()
    return status, found


def test_our_lines_carry_what_is_bound() -> None:
    program = """
import structlog
from foundry.rpc.context import bind_request
from foundry.v1 import common_pb2, rollout_pb2, teacher_pb2
log = structlog.get_logger('ours')
named = common_pb2.CartridgeId(name='a', version=3, digest='blake3:00')
bind_request(rollout_pb2.GenerateBatchRequest(requests=[rollout_pb2.GenerateRequest(cartridges=[named])]))
log.info('first', number=1)
bind_request(teacher_pb2.ScoreRequest())
bind_request(rollout_pb2.GenerateRequest(request_id='req-a'))
log.debug('not this one')
log.warning('second\\nline', strange=object)
"""
    status, lines = run_json(program)
    assert status == 0
    assert [line["event"] for line in lines] == ["first", "second\nline"]
    assert [(line["level"], line["logger"]) for line in lines] == [("info", "ours"), ("warning", "ours")]
    assert (lines[0]["version"], lines[0]["digest"], lines[0]["number"]) == (3, "blake3:00", 1)
    assert "request_id" not in lines[0]
    assert lines[1]["request_id"] == "req-a"


def test_lines_within_a_caller_s_call_carry_trace_and_run() -> None:
    program = f"""
import structlog
from foundry.rpc.context import entered, outgoing
log = structlog.get_logger()
metadata = [('traceparent', '{TRACEPARENT}'), ('foundry-run', 'run-a'), ('other-bin', b'\\0')]
with entered('Score', metadata):
    log.info('within', sent=sorted(outgoing(None)))
"""
    _, (line,) = run_json(program)
    assert line["trace_id"] == TRACEPARENT.split("-")[1]
    assert len(line["span_id"]) == 16
    assert line["run"] == "run-a"
    assert line["sent"] == [["foundry-run", "run-a"], ["traceparent", TRACEPARENT]]


@pytest.mark.parametrize("run_id", ["", "a b", 'a"}', "x" * 65])
def test_a_run_that_is_no_run_s_name_is_not_taken_up(run_id: str) -> None:
    program = f"""
import structlog
from foundry.rpc.context import entered
with entered('Score', [('foundry-run', {run_id!r})]):
    structlog.get_logger().info('within')
"""
    _, (line,) = run_json(program)
    assert "run" not in line
    assert "trace_id" not in line


def test_libraries_warnings_and_what_nobody_caught() -> None:
    program = """
import logging, threading, warnings
before = logging.getLogger('library')
before.handlers, before.propagate = [logging.StreamHandler()], False
configure_logs('teacher', 'info')
before.warning('in %s', 'percent')
logging.getLogger('uvicorn.error').info('starting')
warnings.warn('deprecated')
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger('asyncio').exception('a task failed')
thread = threading.Thread(target=lambda: [][0])
thread.start()
thread.join()
raise RuntimeError('the end')
"""
    status, lines = run_json(program)
    assert status == 1
    events = [line["event"] for line in lines]
    assert events[:2] == ["in percent", "starting"]
    assert "UserWarning: deprecated" in events[2]
    assert events[3:] == ["a task failed", "uncaught", "uncaught"]
    for line, error in zip(lines[3:], ("ZeroDivisionError", "IndexError", "RuntimeError: the end"), strict=True):
        assert line["exception"].startswith("Traceback")
        assert error in line["exception"]


def test_a_typed_error_is_told_without_a_traceback() -> None:
    status, (line,) = run_json("from foundry.errors import PortTaken\nraise PortTaken('it is taken')")
    assert status == 1
    assert (line["reason"], line["error"]) == ("PORT_TAKEN", "it is taken")
    assert "exception" not in line


def test_lines_for_a_terminal() -> None:
    _, lines = run("import structlog\nstructlog.get_logger('ours').info('serving', port=1)", "console")
    assert len(lines) == 1
    assert "serving" in lines[0]
    assert "port" in lines[0]
    assert not lines[0].startswith("{")


def test_an_endpoint_without_the_extra_is_a_plain_error_at_the_start() -> None:
    program = """
import sys
sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None
from foundry import telemetry
from foundry.settings import ServiceSettings
telemetry.start('teacher', ServiceSettings())
telemetry.start('teacher', ServiceSettings(otlp_endpoint='http://127.0.0.1:4317'))
"""
    status, (line,) = run_json(program)
    assert status == 1
    assert line["reason"] == ExtraMissing.reason
    assert "cartridge-foundry[telemetry]" in line["error"]


def test_nothing_is_traced_unless_configured() -> None:
    settings = ServiceSettings()
    assert settings.otlp_endpoint is None
    configure_traces("teacher", settings.otlp_endpoint, settings.trace_sample_ratio)
    assert current_traceparent() == ""
    assert links_to("") == links_to("damaged") == []
    assert len(links_to(TRACEPARENT)) == 1
    assert logging.getLogger("opentelemetry").handlers == []


def test_what_repeats_itself_is_left_out_and_counted() -> None:
    program = f"""
import logging, structlog, time
log = structlog.get_logger('ours')
clock = {{'now': 1000.0}}
make = logging.getLogRecordFactory()
def made(*arguments, **more):
    record = make(*arguments, **more)
    record.created = clock['now']
    return record
logging.setLogRecordFactory(made)
def flood():
    for number in range({MAX_LINES + 50}):
        log.warning('again', number=number)
        logging.getLogger('theirs').error('number %d', number)
        log.info('heard', number=number)
    log.warning('another')
flood()
clock['now'] += {WINDOW_SECONDS}
flood()
"""
    status, lines = run_json(program)
    assert status == 0
    for event, count in {"again": 2 * MAX_LINES, "heard": 2 * (MAX_LINES + 50), "another": 2}.items():
        assert [line["event"] for line in lines].count(event) == count
    theirs = [line for line in lines if line["logger"] == "theirs"]
    ours = [line for line in lines if line["event"] == "again"]
    for some in (theirs, ours):
        assert len(some) == 2 * MAX_LINES
        assert [line.get("left_out") for line in some] == [None] * MAX_LINES + [50] + [None] * (MAX_LINES - 1)
