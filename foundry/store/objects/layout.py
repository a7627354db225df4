"""Where everything lies in object storage.

    blobs/blake3/<hex>.safetensors                          tensors, by content
    cartridges/<name>/<version:010d>.json                   a manifest; or a tombstone where a publisher was replaced
    cartridges/<name>/tags/<tag>.json                       {version, history: [older...], moved_ms}
    counters/<name>/<limit:016d>                            numbers up to the highest limit may have been handed out
    documents/[<tenant>/]<hex>.txt                          a document's bytes
    documents/[<tenant>/]<hex>.json                         {title, num_bytes, created_at}, written last: without it
                                                            there is no document
    datasets/[<tenant>/]<hex>/<family>-<n:06d>.json         {family, number, rows}: a shard of what runs train on
    datasets/[<tenant>/]<hex>/dataset.json                  {digest, families}, written last: all shards are there
    files/<tenant or ->/<id>.bin                            a file's bytes
    files/<tenant or ->/<id>.json                           {filename, purpose, num_bytes, digest, ...}, written last
    batches/<tenant or ->/<id>/batch.json                   what was asked for, by whom, until when
    batches/<tenant or ->/<id>/lease.json                   {holder, attempt, until_ms}: which gateway works on it
    batches/<tenant or ->/<id>/begun.json                   {at, total}: its requests are readable
    batches/<tenant or ->/<id>/cancel.json                  {at}: it is to be cancelled
    batches/<tenant or ->/<id>/finalizing.json              {at}: all that will be answered is
    batches/<tenant or ->/<id>/results/<attempt>-<n>-<completed>-<failed>.jsonl
                                                            {line, completed, text} a line; gone when it is over
    batches/<tenant or ->/<id>/result.json                  {status, at, ...}: the batch is over
    runs/<id>/run.json                                      {spec, name, created_ms}, the tenant if it has one, and the
                                                            traceparent of the request if that was traced
    runs/<id>/attempts/<n:06d>                              one for each time a worker took the run up
    runs/<id>/desired.json                                  {desired: pause | cancel | ""}, the last that was asked for
    runs/<id>/events.jsonl                                  {id, event} a line, written when the run ends
    runs/<id>/result.json                                   {state, error, result, finished_ms}: the run is over
    runs/<id>/checkpoints/<attempt:06d>-<step:010d>.safetensors
    runs/<id>/checkpoints/<attempt:06d>-<step:010d>.json    {digest, num_bytes}, written last
    api-keys/<id>.json                                      {key_id, tenant, scopes, secret_digest, ...}: whose key it
                                                            is, and the hash of its secret
    grants/<name>/<tenant>.json                             {name, tenant, granted_at}: whom else a cartridge answers
    condemned/<batch>.json                                  {digests} of blobs that are being deleted: stands from
                                                            before Redis is marked until the last blob is gone

The limits outlive everything else, so that no number is used twice even if Redis and all versions are gone.

A tenant has fewer letters than a hex has digits, so that the one is never taken for the other.
"""

from __future__ import annotations

import re

from foundry.errors import InvalidArgument
from foundry.identity import check_digest
from foundry.store.names import NAME, RUN, check_name
from foundry.tenants import TENANT, check_tenant

API_KEYS = "api-keys"
BATCHES = "batches"
BLOBS = "blobs"
CARTRIDGES = "cartridges"
COUNTERS = "counters"
DATASETS = "datasets"
DOCUMENTS = "documents"
FILES = "files"
GRANTS = "grants"
RUNS = "runs"
MARKS = "condemned"

TEXT = re.compile(r"documents/(?:(?P<tenant>[^/]+)/)?[0-9a-f]{64}\.txt")
# What is spelt otherwise is not ours: we never wrote it.
KEY_ID = "[a-z2-7]{12}"
API_KEY = re.compile(rf"api-keys/(?P<id>{KEY_ID})\.json")
BLOB = re.compile(r"blobs/blake3/(?P<hex>[0-9a-f]{64})\.safetensors")
MANIFEST = re.compile(rf"cartridges/(?P<name>{NAME})/(?P<version>[0-9]{{10,16}})\.json")
TAG = re.compile(rf"cartridges/(?P<name>{NAME})/tags/(?P<tag>[^/]*[^/0-9][^/]*)\.json")
LIMIT = re.compile(rf"counters/(?P<name>{NAME})/(?P<limit>[0-9]{{16}})")
# The tenant is "" where none stands there.
_OF_TENANT = rf"(?P<tenant>{TENANT}(?=/)|)/?(?P<hex>[0-9a-f]{{64}})"
DOCUMENT = re.compile(rf"documents/{_OF_TENANT}\.json")
# Of a document or data set.
TEXT_FILE = re.compile(rf"(documents|datasets)/{_OF_TENANT}(\.txt|\.json|/[^/]+\.json)")
# Names without a tenant are not granted: what is directly below one of the others is a grant.
GRANT = re.compile(rf"grants/(?P<name>{TENANT}/{TENANT})/(?P<tenant>{TENANT})\.json")
SHARD = re.compile(rf"datasets/{_OF_TENANT}/(?P<family>[^/]+)-(?P<number>[0-9]{{6,16}})\.json")
SUMMARY = re.compile(rf"datasets/{_OF_TENANT}/dataset\.json")
# "-" stands for the tenant "".
_OWNER = rf"(?P<owner>-|{TENANT})"
FILE_ID, BATCH_ID = "file-[a-z2-7]{24}", "batch_[a-z2-7]{24}"
FILE = re.compile(rf"files/{_OWNER}/(?P<id>{FILE_ID})\.json")
FILE_PART = re.compile(rf"files/{_OWNER}/(?P<id>{FILE_ID})\.(json|bin)")
BATCH_PART = re.compile(rf"batches/{_OWNER}/(?P<id>{BATCH_ID})/(?P<part>[a-z]+)(\.json|/[0-9-]+\.jsonl)")
RESULTS = re.compile(
    r".*/results/(?P<attempt>[0-9]{6,16})-(?P<number>[0-9]{6,16})-(?P<completed>[0-9]{1,9})-(?P<failed>[0-9]{1,9})\.jsonl"
)
RUN_RECORD = re.compile(rf"runs/(?P<run>{RUN})/run\.json")
RUN_FILE = re.compile(
    rf"runs/(?P<run>{RUN})/((run|desired|result)\.json|events\.jsonl|attempts/[0-9]+|checkpoints/[0-9-]+\.[a-z]+)"
)
ATTEMPT = re.compile(r".*/attempts/(?P<attempt>[0-9]{6,16})")
CHECKPOINT = re.compile(r"(?P<stem>.*/(?P<attempt>[0-9]{6,16})-(?P<step>[0-9]{10,16}))\.(json|safetensors)")


def api_key(key_id: str) -> str:
    """Raises InvalidArgument unless `key_id` is spelt as one."""
    if not re.fullmatch(KEY_ID, key_id):
        raise InvalidArgument(
            f"{key_id[:100]!r} is not the id of a key: expected 12 of the letters a-z and 2-7", field="key_id"
        )
    return f"{API_KEYS}/{key_id}.json"


def blob(digest: str) -> str:
    return f"{BLOBS}/blake3/{_hex(digest)}.safetensors"


def versions(name: str) -> str:
    """The directory of a name's manifests."""
    return f"{CARTRIDGES}/{name}"


def manifest(name: str, version: int) -> str:
    return f"{versions(name)}/{version:010d}.json"


def tags(name: str) -> str:
    """The directory of a name's tags."""
    return f"{versions(name)}/tags"


def tag(name: str, tag: str) -> str:
    return f"{tags(name)}/{tag}.json"


def limit(name: str, limit: int) -> str:
    return f"{COUNTERS}/{name}/{limit:016d}"


def documents(tenant: str) -> str:
    """The directory of a tenant's documents; that of "" has the other tenants' in it."""
    return f"{DOCUMENTS}/{tenant}" if tenant else DOCUMENTS


def document(tenant: str, digest: str) -> str:
    """Raises InvalidArgument unless `digest` is spelt as one, as `document_info` does."""
    return f"{documents(tenant)}/{_hex(check_digest(digest, field='document'))}.txt"


def document_info(tenant: str, digest: str) -> str:
    return f"{documents(tenant)}/{_hex(check_digest(digest, field='document'))}.json"


def dataset(tenant: str, digest: str) -> str:
    """The directory of a data set. Raises InvalidArgument unless it is spelt as a digest."""
    of_tenant = f"{DATASETS}/{tenant}" if tenant else DATASETS
    return f"{of_tenant}/{_hex(check_digest(digest, field='dataset'))}"


def dataset_shard(tenant: str, digest: str, family: str, number: int) -> str:
    return f"{dataset(tenant, digest)}/{family}-{number:06d}.json"


def dataset_summary(tenant: str, digest: str) -> str:
    return f"{dataset(tenant, digest)}/dataset.json"


def grants(name: str) -> str:
    """The directory of a cartridge's grants."""
    return f"{GRANTS}/{name}"


def grant(name: str, tenant: str) -> str:
    """Raises InvalidArgument unless both are spelt as such."""
    return f"{grants(check_name(name))}/{check_tenant(tenant)}.json"


def files(tenant: str) -> str:
    """The directory of a tenant's files."""
    return f"{FILES}/{tenant or '-'}"


def file(tenant: str, file_id: str, suffix: str) -> str:
    """`suffix` is json for the record, bin for the bytes. Raises InvalidArgument unless `file_id` is spelt as one."""
    return f"{files(tenant)}/{_spelt(FILE_ID, file_id, 'a file')}.{suffix}"


def batches(tenant: str) -> str:
    """The directory of a tenant's batches."""
    return f"{BATCHES}/{tenant or '-'}"


def batch(tenant: str, batch_id: str) -> str:
    """The directory of all that is kept of a batch. Raises InvalidArgument unless `batch_id` is spelt as one."""
    return f"{batches(tenant)}/{_spelt(BATCH_ID, batch_id, 'a batch')}"


def batch_record(tenant: str, batch_id: str, record: str) -> str:
    """`record` is `batch`, `begun`, `cancel`, `finalizing`, `lease` or `result`."""
    return f"{batch(tenant, batch_id)}/{record}.json"


def batch_results(tenant: str, batch_id: str, attempt: int, number: int, completed: int, failed: int) -> str:
    return f"{batch(tenant, batch_id)}/results/{attempt:06d}-{number:06d}-{completed}-{failed}.jsonl"


def _spelt(pattern: str, text: str, what: str) -> str:
    if not re.fullmatch(pattern, text):
        raise InvalidArgument(f"{text[:100]!r} is not the id of {what}", field="id")
    return text


def run(run_id: str) -> str:
    """The directory of all that is kept of a run."""
    return f"{RUNS}/{run_id}"


def run_record(run_id: str, record: str) -> str:
    """`record` is `run.json`, `desired.json`, `events.jsonl` or `result.json`."""
    return f"{run(run_id)}/{record}"


def attempts(run_id: str) -> str:
    """What the keys of a run's attempts begin with."""
    return f"{run(run_id)}/attempts/"


def attempt(run_id: str, attempt: int) -> str:
    return f"{attempts(run_id)}{attempt:06d}"


def checkpoints(run_id: str) -> str:
    """The directory of a run's checkpoints."""
    return f"{run(run_id)}/checkpoints"


def checkpoint(run_id: str, attempt: int, step: int) -> str:
    """A checkpoint's keys but for their suffix."""
    return f"{checkpoints(run_id)}/{attempt:06d}-{step:010d}"


def mark(batch: str) -> str:
    return f"{MARKS}/{batch}.json"


def _hex(digest: str) -> str:
    return digest.removeprefix("blake3:")
