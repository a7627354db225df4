"""`helm test`: one chat completion with the served model."""

import ssl
import sys
from pathlib import Path

import httpx

url, model, timeout_seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
tls = ssl.create_default_context()
if url.startswith("https:"):
    # The gateway's own certificate is enough, whoever issued it. It names the host that people use, not the Service.
    tls.load_verify_locations("/etc/foundry/https/tls.crt")
    tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    tls.check_hostname = False
# Mounted where the gateway asks for one.
key = Path("/run/secrets/foundry/api-key/api-key")
answer = httpx.post(
    f"{url}/v1/chat/completions",
    json={"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
    headers={"authorization": f"Bearer {key.read_text().strip()}"} if key.exists() else {},
    timeout=timeout_seconds,
    verify=tls,
)
print(answer.status_code, answer.text)
answer.raise_for_status()
if answer.json()["usage"]["completion_tokens"] < 1:
    sys.exit("the answer has no token")
