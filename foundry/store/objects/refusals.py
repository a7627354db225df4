"""What an object storage's refusals mean: its answers as our typed errors, without what signs a request."""

from __future__ import annotations

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from foundry.errors import FoundryError, NotFound, StoreFull, StoreRefused, StoreUnavailable

# EFBIG, ENOSPC and EDQUOT arrive as text only; the names are those of S3 servers with quotas.
_FULL = re.compile(r"(os error|\[Errno) (27|28|122)\b|QuotaExceeded|InsufficientStorage|507 Insufficient Storage")
_EXPIRED = re.compile(r"\b(ExpiredToken|TokenRefreshRequired|RequestTimeTooSkewed|RequestExpired)\b")
NO_BUCKET = re.compile(
    r"\b(NoSuchBucket|InvalidBucketName|ContainerNotFound|ContainerBeingDeleted)\b|bucket does not exist"
)
# Where obstore has no type for it: answers to a list or a delete, other stores' spellings, EACCES and EROFS.
_REFUSED = re.compile(
    r"\b(AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|AuthorizationHeaderMalformed"
    r"|401 Unauthorized|403 Forbidden|AuthenticationFailed|AuthorizationFailure|InvalidAuthenticationInfo)\b"
    r"|\(os error (13|30)\)"
)
# Hands out a machine's own credentials, and is asked where none were given. Failing may pass; having none will not.
_METADATA = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")
_ANSWER = re.compile(r"<Code>(?P<code>[^<]*)</Code>.*?<Message>(?P<message>[^<]*)</Message>", re.DOTALL)
# Signed addresses carry what signs them.
_SIGNATURE = re.compile(r"(?i)([?&](?:sig|x-amz-[a-z-]+|x-goog-[a-z-]+|[a-z_]*token)=)[^&\s)]+")


def typed(what: str, key: str, error: Exception, *, writing: bool, directory: bool) -> FoundryError:
    """`what` names the storage, which is a `directory` or a server; `error` was met at `key`."""
    text = text_of(error)
    if _FULL.search(text):
        return StoreFull(f"{what} is full, {key} was not written: {text}")
    # What is missing when something is written can only be the bucket.
    if NO_BUCKET.search(text) or (isinstance(error, FileNotFoundError) and writing and not directory):
        return StoreRefused(f"{what} has no such bucket: make it, or check store.objects_url ({text})")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{what} has no {key}")
    if _EXPIRED.search(text):
        return StoreRefused(f"{what} refused {key}: the credentials have expired, or a clock is wrong ({text})")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text):
        if directory:
            return StoreRefused(f"{what} refused {key}: check who may read and write the directory ({text})")
        return StoreRefused(
            f"{what} refused {key}: check its credentials (store.objects_* settings, else AWS_*, GOOGLE_* or "
            f"AZURE_* variables) and that they may read, write, list and delete there ({text})"
        )
    if _METADATA.search(text):
        if "404 Not Found" in text:
            return StoreRefused(f"{what}: no credentials were given, and this machine has none of its own ({text})")
        return StoreUnavailable(f"{what}: no credentials were given, and the machine's own can't be had: {text}")
    return StoreUnavailable(f"{what} failed at {key}: {text}")


def text_of(error: Exception) -> str:
    """What the storage said, without the page of debug output that obstore appends and without signatures."""
    text = str(error).split("\n\nDebug source", 1)[0]
    if answer := _ANSWER.search(text):
        text = f"{text[: text.find('<')].strip()} {answer['code']}: {answer['message']}"
    return _SIGNATURE.sub(r"\1**********", text)
