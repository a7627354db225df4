"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from foundry.errors import InvalidArgument
from foundry.settings import ServiceSettings
from foundry.store.api_keys import KeyLimits, Most
from foundry.store.key_store import KeyText
from foundry.store.settings import StoreSettings
from services.gateway.access.issuer import check_url
from services.gateway.https import Https

PrivateUrl = Annotated[str, AfterValidator(check_url)]


class JobSettings(BaseModel):
    """The gateway's part in training runs as Kubernetes Jobs, one for each run (docs/jobs.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str = Field(min_length=1)
    """Name of the ConfigMap whose key `job.yaml` is the manifest that Jobs are made from. It owns them."""

    namespace: str = ""
    """Namespace of ConfigMap and Jobs; empty: the service account's, outside a cluster that of KUBECONFIG."""

    poll_seconds: float = Field(default=5.0, gt=0)
    """Time between two looks at runs and Jobs. New and cancelled runs are looked at immediately."""

    max_backoff_seconds: float = Field(default=60.0, gt=0)
    """Longest time between two looks while the Kubernetes API or the store fails."""

    api_timeout_seconds: float = Field(default=10.0, gt=0)
    """Deadline of one call of the Kubernetes API."""

    cancel_grace_seconds: float = Field(default=120.0, ge=0)
    """How long the pod of a cancelled run may take to end the step in hand before its Job is deleted under it."""

    max_cpus: float = Field(default=64.0, gt=0)
    """Most CPUs that a run may ask for (`resources.cpu` of all its pods)."""

    max_memory_bytes: int = Field(default=256 * 2**30, ge=1)
    """Most memory that a run may ask for (`resources.memory` of all its pods)."""

    max_gpus: int = Field(default=8, ge=0)
    """Most GPUs that a run may ask for (`resources.gpus` of all its pods)."""

    max_nodes: int = Field(default=1, ge=1)
    """Most pods that a run may ask for (`resources.nodes`). More than one need a headless Service, whose name is the
    `subdomain` of the template's pods."""


class BatchSettings(BaseModel):
    """Files and batches of OpenAI's API (docs/openai.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    concurrency: int = Field(default=4, ge=1)
    """Requests of batches that this gateway has in flight at one time, of all batches together."""

    max_open: int = Field(default=16, ge=1)
    """Batches of a tenant that are not over."""

    max_requests: int = Field(default=50_000, ge=1, le=50_000)
    """Most requests of a batch."""

    max_files: int = Field(default=1000, ge=1)
    """Files that a tenant may keep at one time."""

    max_file_bytes: int = Field(default=32 * 1024**2, ge=1024, le=200 * 1024**2)
    """Largest file that is uploaded; it is held in memory while a batch is answered."""

    keep_seconds: int = Field(default=30 * 86400, ge=3600)
    """How long files are kept that don't say it, and batches that are over."""

    window_seconds: int = Field(default=86400, ge=1)
    """How long a batch may take (`completion_window` 24h): what is not answered then is an error."""

    poll_seconds: float = Field(default=10.0, gt=0)
    """Time between two looks for batches that nobody works on. One that is created here begins at once."""

    lease_seconds: float = Field(default=60.0, ge=1)
    """After how long without a word from the gateway that works on a batch another takes it up."""


class DefaultLimits(KeyLimits):
    """How much a key may take that has no limit of its own, or everybody together where there are no keys. None: any
    amount."""

    # The environment has only text.
    model_config = ConfigDict(strict=False)

    concurrent_runs: Most = 100
    """Runs of a tenant that are not over, paused ones too."""

    steps_per_run: Most = 100_000
    """Optimiser steps of one run; the largest recipe takes 4,000."""


class OidcSettings(BaseModel):
    """Tokens of an OIDC issuer, which are taken beside API keys (docs/security.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    issuer: PrivateUrl
    """URL of the issuer, written as in its tokens (`iss`): https, or http on this machine."""

    audience: str = Field(min_length=1)
    """What a token must be for (`aud`)."""

    jwks_url: PrivateUrl | None = None
    """URL of the issuer's keys. Unset: what its discovery document says, `ISSUER/.well-known/openid-configuration`."""

    tenant_claim: str = "tenant"
    """Claim that names the tenant. Empty: all who have a token ask for the names without a tenant."""

    scopes_claim: str = "scope"
    """Claim that names the scopes, with spaces between them or as a list."""

    scope_prefix: str = "foundry:"
    """What stands before a scope there: `foundry:query`. Others are passed over."""

    leeway_seconds: float = Field(default=30.0, ge=0, le=600)
    """How far the issuer's clock may be from the gateway's."""


class ConversionSettings(BaseModel):
    """Bounds of the processes that read PDF, HTML and DOCX (docs/documents.md), with the extra `documents`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    timeout_seconds: float = Field(default=60.0, ge=1)
    """Longest time to read one file."""

    max_memory_bytes: int = Field(default=2**30, ge=2**27)
    """Most memory, as addresses, that reading one file may take."""

    max_concurrent: int = Field(default=2, ge=1)
    """Files that are read at one time; others wait."""


class GatewaySettings(ServiceSettings):
    """The gateway: the REST API for people and applications."""

    listen: str = "127.0.0.1:8000"
    """host:port to serve HTTP on; port 0 takes a free one."""

    api_keys: bool = False
    """Answer only who shows an API key (docs/security.md). Off: whoever reaches the gateway may do everything, as on a
    laptop."""

    admin_key_file: Path | None = None
    """File with an API key (`fdy_ID_SECRET`) that the operator made, besides those of `foundry keys`. It has all
    scopes, for the names without a tenant."""

    api_keys_refresh_seconds: float = Field(default=10.0, gt=0)
    """Time between two looks at which API keys and grants there are: a key that is revoked is answered for as long."""

    oidc: OidcSettings | None = None
    """Answer also who shows a token of this OIDC issuer; only with api_keys. Unset: nobody's."""

    https_server_certificate_file: Path | None = None
    """Certificate (PEM), with those between it and its authority, by which people and applications know the gateway.
    With it HTTPS is served, and no plain HTTP. Files that are renewed in place are read anew. The `tls_*` files are for
    gRPC."""

    https_server_key_file: Path | None = None
    """Private key of that certificate (PEM, without a password)."""

    audit_log_file: Path | None = None
    """File to which the audit log is appended, besides the gateway's own log (docs/security.md). Unset: none."""

    audit_completions: bool = False
    """Note completions in the audit log too. Off: only those that are refused."""

    allowed_hosts: list[str] | None = None
    """Names by which clients may call the gateway (`Host`, without port; health by any): a web page can't
    make a name of its own mean it. An empty list: any. Unset: `localhost` and such where it listens on loopback, any
    elsewhere."""

    allowed_origins: list[str] = Field(default=[])
    """Origins of web pages, such as `https://app.example.com`, that may call the gateway from a browser, besides its
    own. Everybody else's are refused."""

    allowed_methods: list[str] = Field(default=["*"])
    """Methods that such pages may use; `*`: all."""

    allowed_headers: list[str] = Field(default=["*"])
    """Headers that such pages may send; `*`: all."""

    allow_credentials: bool = False
    """Let such pages send cookies and the browser's own `Authorization`, as proxies that ask for a login want."""

    cors_max_age_seconds: int = Field(default=600, ge=0)
    """How long a browser may remember what such pages may do."""

    rollout_addresses: list[str] = Field(default=["127.0.0.1:7001"], min_length=1)
    """host:port of the rollout servers. A name with several addresses (a headless Service) stands for all of them."""

    teacher_address: str | None = None
    """host:port of the teacher, as the trainer has it. With it, a new run's document is measured at once against the
    model's context and the number of cartridge tokens."""

    store: StoreSettings
    """Where documents, runs and cartridges are."""

    conversions: ConversionSettings = ConversionSettings()
    """How files that are no plain text are read."""

    jobs: JobSettings | None = None
    """Train each run by a Kubernetes Job of its own. Unset: workers take them from the queue."""

    tokenizer: Path | None = None
    """tokenizer.json of the served model, to spell tokens in `logprobs`. Without it they are written `token_id:N`."""

    request_timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time to answer one request, all attempts together."""

    retry_timeout_seconds: float = Field(default=5.0, ge=0)
    """How long a request that has no token yet is tried again while rollout servers are unavailable."""

    poll_seconds: float = Field(default=2.0, gt=0)
    """Time between two looks at which rollout servers there are and what they serve."""

    census_seconds: float = Field(default=60.0, gt=0)
    """Time between two looks at how much the store holds, for /metrics and `limits.stored_bytes`: each costs Redis a
    few milliseconds for 100 names, and a listing of the blobs and of the documents in object storage."""

    max_request_bytes: int = Field(default=3 * 1024**2, ge=1024, le=3 * 1024**2)
    """Largest request body, documents apart (those: `store.max_document_bytes`). A prompt must fit a gRPC message."""

    max_connections: int = Field(default=2048, ge=1)
    """Connections of clients at one time; more are refused with 503."""

    keep_alive_seconds: float = Field(default=5.0, gt=0)
    """How long a connection without a request is kept. Behind a proxy that keeps its own, longer than that does: it
    would send a request into a connection that is just being closed."""

    max_upload_seconds: float = Field(default=60.0, gt=0)
    """How long a client may take to send a request, all of it."""

    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Completions in flight; more are refused with 429."""

    transfer_memory_bytes: int = Field(default=384 * 1024**2, ge=1024)
    """Memory for cartridges that are sent and taken as files: a larger one is refused; one for which others leave no
    room, with 429 for the moment. The process takes up to twice that, since it keeps the last one's for the next. An
    upload must come within `max_upload_seconds` too."""

    batches: BatchSettings = BatchSettings()
    """Files and batches."""

    limits: DefaultLimits = DefaultLimits()
    """What a key without limits of its own may take; without keys, everybody together (security.md)."""

    max_choices: int = Field(default=128, ge=1)
    """Most choices (prompts times n) of one request."""

    grace_seconds: float = Field(default=30.0, ge=0)
    """How long requests in flight may go on after SIGTERM."""

    @model_validator(mode="after")
    def _keys_are_asked_for(self) -> Self:
        for name in ("admin_key_file", "oidc"):
            if getattr(self, name) is not None and not self.api_keys:
                raise ValueError(f"{name} is for api_keys: set that too")
        return self

    @property
    def admin_key(self) -> KeyText | None:
        """Raises InvalidArgument if the file can't be used."""
        if self.admin_key_file is None:
            return None
        try:
            return KeyText.parse(self.admin_key_file.read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"admin_key_file can't be read: {error}", field="admin_key_file") from None
        except InvalidArgument:
            raise InvalidArgument(
                f"admin_key_file: {self.admin_key_file} must hold an API key: fdy_ID_SECRET with 12 of the letters a-z "
                "and 2-7, and 32 to 128 letters, digits, '_' and '-'",
                field="admin_key_file",
            ) from None

    @model_validator(mode="after")
    def _https_files_belong_together(self) -> Self:
        if (self.https_server_certificate_file is None) != (self.https_server_key_file is None):
            raise ValueError(
                "https_server_certificate_file and https_server_key_file belong together: set both or none"
            )
        return self

    @property
    def https(self) -> Https | None:
        """None where plain HTTP is served. Raises InvalidArgument if a file can't be used."""
        if self.https_server_certificate_file is None or self.https_server_key_file is None:
            return None
        return Https(self.https_server_certificate_file, self.https_server_key_file)
