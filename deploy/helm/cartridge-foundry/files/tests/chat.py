"""`helm test`: one chat completion with the served model."""

import ssl
import sys
from pathlib import Path

import httpx

url, model, timeout_seconds, *key_file = sys.argv[1], sys.argv[2], float(sys.argv[3]), *sys.argv[4:]
tls = ssl.create_default_context()
if url.startswith("https:"):
    # The gateway's own certificate is enough, whoever issued it. It names the host that people use, not the Service.
    tls.load_verify_locations("/etc/foundry/https/tls.crt")
    tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    tls.check_hostname = False
answer = httpx.post(
    f"{url}/v1/chat/completions",
    json={"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
    # Where the gateway asks for a key.
    headers={"authorization": f"Bearer {Path(key_file[0]).read_text().strip()}"} if key_file else {},
    timeout=timeout_seconds,
    verify=tls,
)
print(answer.status_code, answer.text)
answer.raise_for_status()
if answer.json()["usage"]["completion_tokens"] < 1:
    sys.exit("the answer has no token")
