"""How a process reaches the store and what the store keeps."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class StoreSettings(BaseModel):
    """Settings of the store; the same in every service that shares one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    redis_url: SecretStr
    """Redis or Valkey, one primary (no cluster): `redis://`, `rediss://` (TLS; `?ssl_ca_certs=PATH`) or `unix://`,
    with user and password in it. Keys start with `foundry:`."""

    objects_url: str = Field(pattern=r"^(file|s3|gs|az|memory)://")
    """Object storage: `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`. Credentials: in
    the environment."""

    keep_hot: int = Field(default=4, ge=1)
    """Newest versions per name whose bytes stay in Redis. Tagged, leased and latest ones stay besides."""

    redis_timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest wait for a connection to Redis and for one reply."""

    objects_retry_seconds: float = Field(default=20.0, gt=0)
    """Longest time during which a failed request to remote object storage is repeated."""

    recovery_lease_seconds: float = Field(default=30.0, gt=0)
    """After Redis was lost: how long the workers of running runs have to report before others get them."""

    max_cartridge_bytes: int = Field(default=16 * 2**30, ge=1)
    """Largest cartridge that is read: what claims to be larger is damaged."""

    max_document_bytes: int = Field(default=16 * 2**20, ge=1)
    """Largest document that is stored."""

    event_stream_length: int = Field(default=10_000, ge=1)
    """Events kept in Redis: of published versions, and of each run (approximate)."""
