"""Every failure that a caller can meet, as a type.

An error says what was wrong, where, and what to do. `reason` names the type on the wire (google.rpc.ErrorInfo) so that
a client raises what the server raised; `grpc_code` and `http_status` say how the two edges report it.
"""

from __future__ import annotations

from typing import ClassVar


class FoundryError(Exception):
    """Base of all typed errors. Raised as itself only for faults that are ours."""

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        # The request field at fault, as the caller spelt it.
        self.field = field
        self.retry_after_seconds = retry_after_seconds


class InvalidArgument(FoundryError):
    """The request can never succeed as it stands."""

    reason = "INVALID_ARGUMENT"
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class ContextLengthExceeded(InvalidArgument):
    """Prompt and answer do not fit the model's context."""

    # OpenAI's own code: applications shorten their conversation where they read it.
    reason = "context_length_exceeded"


class DocumentTooLong(InvalidArgument):
    """The document does not fit the model's context."""

    reason = "DOCUMENT_TOO_LONG"


class DocumentUnreadable(InvalidArgument):
    """The document is empty or is not text."""

    reason = "DOCUMENT_UNREADABLE"


class CartridgeUnreadable(InvalidArgument):
    """A file is no cartridge, is damaged, or holds what no cartridge has."""

    reason = "CARTRIDGE_UNREADABLE"


class CartridgeTooLong(InvalidArgument):
    """More cartridge tokens were asked for than the document has."""

    reason = "CARTRIDGE_TOO_LONG"


class PartialPage(InvalidArgument):
    """A cartridge's length is no multiple of the pages of the server that would decode with it."""

    reason = "PARTIAL_PAGE"


class TemplateUnsupported(InvalidArgument):
    """The chat template cannot be split into context and turn."""

    reason = "TEMPLATE_UNSUPPORTED"


class ModelUnsupported(InvalidArgument):
    """The model has a part that the foundry does not reproduce exactly."""

    reason = "MODEL_UNSUPPORTED"


class RopeUnsupported(InvalidArgument):
    """Keys of cartridges can't be moved behind others: not by this engine, or not for this model."""

    reason = "ROPE_UNSUPPORTED"


class NotFound(FoundryError):
    """The named thing does not exist."""

    reason = "NOT_FOUND"
    grpc_code = "NOT_FOUND"
    http_status = 404


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"


class CartridgeNotFound(NotFound):
    """No cartridge, version, tag or digest of that name."""

    reason = "CARTRIDGE_NOT_FOUND"


class DocumentNotFound(NotFound):
    reason = "DOCUMENT_NOT_FOUND"


class GrantNotFound(NotFound):
    reason = "GRANT_NOT_FOUND"


class RunNotFound(NotFound):
    reason = "RUN_NOT_FOUND"


class FileNotKept(NotFound):
    """There is no such file, or not any more."""

    reason = "FILE_NOT_FOUND"


class BatchNotFound(NotFound):
    reason = "BATCH_NOT_FOUND"


class ApiKeyNotFound(NotFound):
    reason = "API_KEY_NOT_FOUND"


class ContextNotFound(NotFound):
    """The teacher does not hold that context: put it again."""

    reason = "CONTEXT_NOT_FOUND"


class Conflict(FoundryError):
    """What exists already contradicts the request."""

    reason = "CONFLICT"
    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class RunOver(Conflict):
    """The run has ended: nobody can take it up."""

    reason = "RUN_OVER"


class Unauthenticated(FoundryError):
    """The caller did not show who it is."""

    reason = "UNAUTHENTICATED"
    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(FoundryError):
    """The caller may not do that."""

    reason = "PERMISSION_DENIED"
    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class IdentityMismatch(FoundryError):
    """Two parties mean different models, templates or bytes."""

    reason = "IDENTITY_MISMATCH"
    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


class FingerprintMismatch(IdentityMismatch):
    """The caller means another model than the one served."""

    reason = "FINGERPRINT_MISMATCH"


class ShapeMismatch(IdentityMismatch):
    """A cartridge does not have the shape, dtype or rope that the model needs."""

    reason = "SHAPE_MISMATCH"


class PolicyUnproven(IdentityMismatch):
    """The server can't prove what it decodes with: it serves, and nobody may train on its answers."""

    reason = "POLICY_UNPROVEN"


class DigestMismatch(FoundryError):
    """Bytes do not hash to the digest that names them."""

    reason = "DIGEST_MISMATCH"
    grpc_code = "DATA_LOSS"
    http_status = 500


class AlignmentError(FoundryError):
    """A score or an answer belongs to other token ids than the ones it came with."""

    reason = "ALIGNMENT"
    grpc_code = "DATA_LOSS"
    http_status = 500


class PolicyMismatch(FoundryError):
    """The rollout's logprobs are not those of the version it names."""

    reason = "POLICY_MISMATCH"
    grpc_code = "DATA_LOSS"
    http_status = 500


class Fenced(FoundryError):
    """A newer attempt of the run holds the name: stop."""

    reason = "FENCED"
    grpc_code = "ABORTED"
    http_status = 409


class ResourceExhausted(FoundryError):
    """A queue or a budget is full; carries when to try again."""

    reason = "RESOURCE_EXHAUSTED"
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class StoreFull(FoundryError):
    """The disk or bucket takes no more bytes. Nothing was published."""

    reason = "STORE_FULL"
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 507


class Unavailable(FoundryError):
    """A service or store cannot be reached now; the same call may succeed later."""

    reason = "UNAVAILABLE"
    grpc_code = "UNAVAILABLE"
    http_status = 503


class StoreUnavailable(Unavailable):
    """Redis or the object store cannot be reached."""

    reason = "STORE_UNAVAILABLE"


class StoreRefused(StoreUnavailable):
    """Redis or the object store answers, but not to us: wrong credentials, no permission, no such bucket.

    Durable versions are still served where they can be, as with any store that is away; but no caller waits for it.
    """

    reason = "STORE_REFUSED"


class RankLost(Unavailable):
    """A process of the several that train one run died or fell silent: none of them can go on, the run can."""

    reason = "RANK_LOST"


class DeadlineExceeded(FoundryError):
    """The call's budget ran out."""

    reason = "DEADLINE_EXCEEDED"
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(FoundryError):
    """The caller went away."""

    reason = "CANCELLED"
    grpc_code = "CANCELLED"
    http_status = 499


class ExtraMissing(FoundryError, ImportError):
    """A package of an extra that was not installed is needed."""

    reason = "EXTRA_MISSING"


class PortTaken(FoundryError):
    """Something else listens on the address."""

    reason = "PORT_TAKEN"


class HomeUnusable(FoundryError):
    """The system refuses a file or directory of the local stack."""

    reason = "HOME_UNUSABLE"


def _subclasses(cls: type[FoundryError]) -> list[type[FoundryError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _subclasses(child))]


BY_REASON: dict[str, type[FoundryError]] = {cls.reason: cls for cls in _subclasses(FoundryError)}
