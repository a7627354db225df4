"""How a process reaches the store and what the store keeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, Secret, SecretStr, field_validator, model_validator

_HIDDEN = "**********"


class SecretUrl(Secret[str]):
    """A URL that may hold a password: shown with the password replaced."""

    def _display(self) -> str:
        # To the last @: a password that is not percent-encoded may hold one.
        shown = re.sub(r"(?s)(://[^:@]*):.*@", rf"\1:{_HIDDEN}@", self.get_secret_value())
        shown = re.sub(r"(?i)([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", rf"\1{_HIDDEN}", shown)
        # What is no URL may be a password in the wrong place.
        return shown if re.match(r"(rediss?|unix)://", shown) else _HIDDEN


class StoreSettings(BaseModel):
    """Settings of the store; the same in every service that shares one.

    Of a secret and its `_file` one is set at most. Files, such as a mounted Kubernetes secret's, are read when the
    service starts.
    """

    # Errors name the field, and don't show what was written there.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    redis_url: SecretUrl
    """Redis or Valkey, one primary (no cluster): `redis://HOST:PORT/DB`, `rediss://` (TLS) or `unix:///PATH`. Keys
    start with `foundry:`. A user and password may stand in it, percent-encoded; it is shown without the password."""

    redis_username: str = ""
    """ACL user; empty is Redis' default user."""

    redis_password: SecretStr | None = None
    """Password of the user."""

    redis_password_file: Path | None = None
    """File that holds the password."""

    redis_ca_file: Path | None = None
    """PEM file of the authorities that may sign Redis' certificate; without it those of the system."""

    redis_certificate_file: Path | None = None
    """PEM file of our certificate, where Redis asks for one (`tls-auth-clients`)."""

    redis_key_file: Path | None = None
    """PEM file of the key of our certificate, without a passphrase."""

    objects_url: str
    """Object storage: `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`. What the settings below don't say about
    s3 is taken from the usual variables (`AWS_*`), and all about gs and az from theirs (`GOOGLE_*`, `AZURE_*`)."""

    objects_endpoint: str | None = None
    """URL of an S3 server other than Amazon's."""

    objects_region: str | None = None
    """Region of the S3 bucket."""

    objects_access_key_id: SecretStr | None = None
    """S3 access key id; needs the secret key too."""

    objects_access_key_id_file: Path | None = None
    """File that holds the access key id."""

    objects_secret_access_key: SecretStr | None = None
    """S3 secret access key."""

    objects_secret_access_key_file: Path | None = None
    """File that holds the secret access key."""

    objects_session_token: SecretStr | None = None
    """S3 session token, where the key is a temporary one."""

    objects_session_token_file: Path | None = None
    """File that holds the session token."""

    objects_allow_http: bool = False
    """Speak to the S3 server without TLS, where its URL is `http://`."""

    objects_ca_file: Path | None = None
    """PEM file of an authority that may sign the S3 server's certificate, besides those of the system."""

    signing_key_file: Path | None = None
    """File with keys of 32 or more random characters, one a line. Records in object storage are signed with the first
    and must be signed with one of them to be read. Unset: they are not signed, and signatures are not looked at."""

    keep_hot: int = Field(default=4, ge=1)
    """Newest versions per name whose bytes stay in Redis. Tagged, leased and latest ones stay besides."""

    keep_durable: int | None = Field(default=None, ge=1)
    """Newest durable versions per name that `foundry gc` keeps; none: all. Tagged, leased and latest ones and those of
    a run that holds the name stay besides."""

    keep_durable_days: float | None = Field(default=None, gt=0)
    """Age beyond which `foundry gc` removes durable versions, with the same exceptions; none: they don't age."""

    keep_runs_days: float | None = Field(default=None, gt=0)
    """How long after its end `foundry gc` keeps a run, in object storage and Redis; none: for ever. Its versions have
    limits of their own."""

    keep_documents_days: float | None = Field(default=None, gt=0)
    """How long after it was last put `foundry gc` keeps a document that neither a run nor a manifest names, and a data
    set of a tenant whose runs are all over; none: for ever."""

    sweep_grace_seconds: float = Field(default=3600.0, ge=0)
    """Younger objects are never swept: longer than any publication takes, and than clocks differ."""

    redis_timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest wait for a connection to Redis and for one reply."""

    objects_retry_seconds: float = Field(default=20.0, gt=0)
    """Longest time during which a failed request to remote object storage is repeated."""

    objects_timeout_seconds: float = Field(default=90.0, gt=0)
    """Longest time for one call of object storage with its repetitions, besides the time that its bytes take at 1 MiB
    per second. What has not answered by then is away, be it a directory that hangs."""

    recovery_lease_seconds: float = Field(default=30.0, gt=0)
    """After Redis was lost: how long the workers of running runs have to report before others get them."""

    max_cartridge_bytes: int = Field(default=16 * 2**30, ge=1)
    """Largest cartridge that is read: what claims to be larger is damaged."""

    max_document_bytes: int = Field(default=16 * 2**20, ge=1)
    """Largest document that is stored and read."""

    event_stream_length: int = Field(default=10_000, ge=1)
    """Events kept in Redis: of published versions, and of each run (approximate)."""

    @field_validator("objects_url")
    @classmethod
    def _no_credentials_in_objects_url(cls, url: str) -> str:
        if not re.match(r"(file|s3|gs|az|memory)://", url):
            raise ValueError("expected file://, s3://, gs:// or az://")
        if not url.startswith(("file:", "memory:")) and ("@" in url or urlsplit(url).query):
            raise ValueError("credentials don't belong into this URL: use the settings for them, or the environment")
        return url

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for name in ("redis_password", "objects_access_key_id", "objects_secret_access_key", "objects_session_token"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"store.{name} and store.{name}_file are both set: use one")
        given = {name: self._has(f"objects_{name}") for name in ("access_key_id", "secret_access_key", "session_token")}
        if given["access_key_id"] != given["secret_access_key"] or (
            given["session_token"] and not given["access_key_id"]
        ):
            raise ValueError("store.objects_access_key_id and store.objects_secret_access_key belong together")
        if (self.redis_certificate_file is None) != (self.redis_key_file is None):
            raise ValueError("store.redis_certificate_file and store.redis_key_file belong together")
        only_s3 = ("endpoint", "region", "ca_file", "allow_http")
        if not self.objects_url.startswith("s3:") and (
            any(given.values()) or any(getattr(self, f"objects_{name}") for name in only_s3)
        ):
            raise ValueError("the store.objects_* settings are for s3; gs and az take GOOGLE_* and AZURE_* variables")
        return self

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None or getattr(self, f"{name}_file") is not None
