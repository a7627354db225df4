"""`helm test`: the gateway reaches the store and at least one rollout server."""

import sys
import time

import httpx

url, timeout_seconds = sys.argv[1], float(sys.argv[2])
deadline = time.monotonic() + timeout_seconds
while True:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10)
        print(answer.status_code, answer.text, flush=True)
        if answer.status_code == 200:
            break
    except httpx.TransportError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if time.monotonic() > deadline:
        sys.exit(f"{url}/readyz was not ready in {timeout_seconds:.0f} s")
    time.sleep(2)
