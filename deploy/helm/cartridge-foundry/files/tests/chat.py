"""`helm test`: one chat completion with the served model."""

import sys

import httpx

url, model, timeout_seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
answer = httpx.post(
    f"{url}/v1/chat/completions",
    json={"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
    timeout=timeout_seconds,
)
print(answer.status_code, answer.text)
answer.raise_for_status()
if answer.json()["usage"]["completion_tokens"] < 1:
    sys.exit("the answer has no token")
