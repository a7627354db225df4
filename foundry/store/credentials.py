"""Who we are to Redis and to object storage: secrets from settings or mounted files, as the two clients take them.

Files are read when a store is opened. No message of this module holds a secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr
from redis.connection import parse_url

from foundry.errors import InvalidArgument
from foundry.store.settings import StoreSettings

if TYPE_CHECKING:
    from obstore.store import S3Credential

# What a Redis URL may ask for besides its place; all else has a setting.
_URL_OPTIONS = {"db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_REDIS_URL = "redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH, with USER:PASSWORD@ percent-encoded"


@dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach an S3 server and sign for it. What is None is taken from the AWS_* variables."""

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    allow_http: bool = False
    ca_certificates: bytes | None = None

    @classmethod
    def of(cls, settings: StoreSettings) -> S3Access:
        """Raises InvalidArgument if a file can't be read."""
        return cls(
            endpoint=settings.objects_endpoint,
            region=settings.objects_region,
            access_key_id=_secret(settings, "objects_access_key_id"),
            secret_access_key=_secret(settings, "objects_secret_access_key"),
            session_token=_secret(settings, "objects_session_token"),
            allow_http=settings.objects_allow_http,
            ca_certificates=_read(settings.objects_ca_file, "objects_ca_file") if settings.objects_ca_file else None,
        )

    def options(self) -> dict[str, Any]:
        """Arguments of `obstore.store.from_url`."""
        options: dict[str, Any] = {}
        config = {"endpoint": self.endpoint, "region": self.region}
        if config := {name: value for name, value in config.items() if value is not None}:
            options["config"] = config
        client: dict[str, Any] = {}
        if self.allow_http:
            client["allow_http"] = True
        if self.ca_certificates is not None:
            client["root_certificate"] = self.ca_certificates
        if client:
            options["client_options"] = client
        if self.access_key_id is not None:
            # Not by `config`: that would leave a session token of the environment beside our key.
            options["credential_provider"] = self._credentials
        return options

    def _credentials(self) -> S3Credential:
        assert self.access_key_id is not None
        assert self.secret_access_key is not None
        credential: S3Credential = {
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "expires_at": None,
        }
        if self.session_token is not None:
            credential["token"] = self.session_token
        return credential


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """Where Redis is and who we are: `options` are those of a connection of redis-py, blocking or not."""

    # "tcp", "tls" or "unix": which class of connection takes the options.
    transport: str
    options: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, settings: StoreSettings) -> RedisAccess:
        """Raises InvalidArgument for a URL that can't be read and for files that can't."""
        url = settings.redis_url.get_secret_value()
        # Neither parser's text is passed on: both quote what they could not read, which may be a password.
        try:
            parts = urlsplit(url)
            options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
            in_query = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        except ValueError:
            raise InvalidArgument(f"the Redis URL can't be read; expected {_REDIS_URL}", field="redis_url") from None
        if unknown := in_query - _URL_OPTIONS:
            raise InvalidArgument(
                f"the Redis URL has options that are not known: {', '.join(sorted(unknown))}; known are "
                f"{', '.join(sorted(_URL_OPTIONS))}",
                field="redis_url",
            )
        options.pop("connection_class", None)
        transport = {"redis": "tcp", "rediss": "tls", "unix": "unix"}[parts.scheme]
        password = _secret(settings, "redis_password")
        for name, value in (("username", settings.redis_username), ("password", password)):
            if value and name in options:
                raise InvalidArgument(
                    f"the Redis URL and store.redis_{name} both give a {name}: use one", field=f"redis_{name}"
                )
            if value:
                options[name] = value
        files = {
            "ssl_ca_certs": ("redis_ca_file", settings.redis_ca_file),
            "ssl_certfile": ("redis_certificate_file", settings.redis_certificate_file),
            "ssl_keyfile": ("redis_key_file", settings.redis_key_file),
        }
        for option, (name, path) in files.items():
            if path is None:
                continue
            if transport != "tls":
                raise InvalidArgument(f"store.{name} needs TLS: write the Redis URL with rediss://", field=name)
            _read(path, name)
            options[option] = str(path)
        return cls(transport, options)


def _secret(settings: StoreSettings, name: str) -> str | None:
    """The value, or what the file holds, without the line's end that editors and `kubectl` leave there."""
    value: SecretStr | None = getattr(settings, name)
    if value is not None:
        return value.get_secret_value()
    path: Path | None = getattr(settings, f"{name}_file")
    if path is None:
        return None
    content = _read(path, f"{name}_file")
    try:
        secret = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InvalidArgument(f"store.{name}_file: {path} is not UTF-8 text", field=f"{name}_file") from None
    if not secret:
        raise InvalidArgument(f"store.{name}_file: {path} is empty", field=f"{name}_file")
    return secret


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"store.{name}: {path} can't be read: {error.strerror}", field=name) from None
