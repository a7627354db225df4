"""`helm test`: the gateway reaches the store and at least one rollout server."""

import ssl
import sys
import time

import httpx

url, timeout_seconds = sys.argv[1], float(sys.argv[2])
tls = ssl.create_default_context()
if url.startswith("https:"):
    # The gateway's own certificate is enough, whoever issued it. It names the host that people use, not the Service.
    tls.load_verify_locations("/etc/foundry/https/tls.crt")
    tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    tls.check_hostname = False
deadline = time.monotonic() + timeout_seconds
while True:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10, verify=tls)
        print(answer.status_code, answer.text, flush=True)
        if answer.status_code == 200:
            break
    except httpx.TransportError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if time.monotonic() > deadline:
        sys.exit(f"{url}/readyz was not ready in {timeout_seconds:.0f} s")
    time.sleep(2)
