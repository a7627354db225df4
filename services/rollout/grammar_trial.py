"""Tries grammars, which anybody may send, in a process of its own: `python -m services.rollout.grammar_trial`.

llguidance bounds most of its work, but not all: a multiple of a large number is a machine with as many states. So a
grammar is compiled there first, and followed for some tokens; one that takes too long ends that process only.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

TRIAL_SECONDS = 3.0
_MEMORY_BYTES = 4 * 1024**3
# Tokens of a random sentence, and how long what may come next may take to say: everybody's step waits for it.
_NUM_TOKENS = 32
_TOKEN_SECONDS = 0.25
# Lexer states take 1 to 2 kB each; fuel is about 50,000 a millisecond at the beginning and 14,000 in a step.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=10_000,
    max_grammar_size=50_000,
    # What it says of a fault would hold the whole grammar.
    verbose_errors=False,
)


class Trials:
    """The process, begun with the first grammar and again after one that was too much for it."""

    def __init__(self, tokenizer: str, vocab_size: int, end_id: int) -> None:
        """`tokenizer` is a tokenizer.json."""
        self._setup = [tokenizer, vocab_size, end_id]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def fault(self, spec: str) -> str:
        """What is wrong with a grammar; empty if nothing is."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
                weakref.finalize(self, _end, self._process)
                if _ask(self._process, self._setup) is None:
                    raise RuntimeError("the process that tries grammars did not start")
            answer = _ask(self._process, spec)
            if answer is None:
                _end(self._process)
                return f"it takes more than {TRIAL_SECONDS:.0f} seconds, or too much memory"
            return answer


def _start() -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "services.rollout.grammar_trial"]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _ask(process: subprocess.Popen[str], message: object) -> str | None:
    """The answer; None if the process ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    return str(json.loads(line)) if line else None


def _fault(tokenizer: LLTokenizer, spec: str) -> str:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(spec), log_level=0, limits=LIMITS)
    choices = random.Random(0)
    for _ in range(_NUM_TOKENS):
        if matcher.is_stopped():
            break
        began = time.perf_counter()
        mask = matcher.compute_bitmask()
        if time.perf_counter() - began > _TOKEN_SECONDS:
            return f"to say what may come next takes more than {_TOKEN_SECONDS} seconds"
        allowed = [8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]
        if not allowed or matcher.is_error():
            break
        matcher.consume_token(choices.choice(allowed))
    return str(matcher.get_error())


def main() -> None:
    # Ended by the one that asks, or with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    tokenizer: LLTokenizer | None = None
    for line in sys.stdin:
        if tokenizer is None:
            text, vocab_size, end_id = json.loads(line)
            tokenizer, answer = LLTokenizer(text, n_vocab=vocab_size, eos_token=end_id), ""
        else:
            signal.setitimer(signal.ITIMER_REAL, TRIAL_SECONDS)
            answer = _fault(tokenizer, json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
