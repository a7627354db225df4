"""An OIDC issuer: serves its discovery document and its keys on this machine, and signs tokens."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

# Making one takes a good part of a second.
_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_DISCOVERY, _KEYS = "/.well-known/openid-configuration", "/keys"
AUDIENCE = "foundry"


class OidcIssuer:
    def __init__(self) -> None:
        self.private_keys: dict[str, Any] = {
            "rsa": _RSA,
            "ec": ec.generate_private_key(ec.SECP256R1()),
            "ed": ed25519.Ed25519PrivateKey.generate(),
        }
        self.num_looks = 0
        # Anything that is to be said instead, by path.
        self.answers: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, *, key: str = "rsa", kid: str | None = None, **changes: Any) -> str:
        """Good for an hour, for the tenant acme, and to query; claims that are None are left out."""
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "somebody",
            "exp": int(time.time()) + 3600,
            "tenant": "acme",
            "scope": "openid foundry:query",
        } | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        algorithm = {"rsa": "RS256", "ec": "ES256", "ed": "EdDSA"}[key]
        return jwt.encode(claims, self.private_keys[key], algorithm, headers={"kid": kid or key})

    def public_keys(self) -> list[dict[str, Any]]:
        kinds: dict[str, Any] = {"rsa": RSAAlgorithm, "ec": ECAlgorithm, "ed": OKPAlgorithm}
        return [
            kinds[name.partition("-")[0]].to_jwk(key.public_key(), as_dict=True) | {"kid": name, "use": "sig"}
            for name, key in self.private_keys.items()
        ]

    def answer(self, path: str) -> bytes:
        if path in self.answers:
            return self.answers[path]
        if path == _DISCOVERY:
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}{_KEYS}"}).encode()
        self.num_looks += 1
        return json.dumps({"keys": self.public_keys()}).encode()


def _handler(issuer: OidcIssuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = issuer.answer(self.path)
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *unused: object) -> None:
            pass

    return Handler
