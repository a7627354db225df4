"""The store: versioned cartridges, documents and runs, in object storage and Redis. No torch in here."""

from foundry.store.batches import BatchFinal, BatchRecord, BatchState, BatchStore, Row
from foundry.store.cartridges import CartridgeStore
from foundry.store.datasets import DatasetStore, DatasetSummary
from foundry.store.documents import DocumentInfo, DocumentStore
from foundry.store.files import FileInfo, FileStore
from foundry.store.grants import Grant, GrantStore
from foundry.store.key_store import ApiKey, KeyStore
from foundry.store.lineage import Ancestor, lineage
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import CartridgeId, Reference, check_name, check_new_name, check_tag
from foundry.store.objects.checkpoints import Checkpoints
from foundry.store.objects.objects import Objects
from foundry.store.record import ActiveRuns, ClaimedRun, Desired, RunRecord, RunState
from foundry.store.redis.pointers import Published
from foundry.store.runs import RunStore
from foundry.store.settings import StoreSettings
from foundry.store.spec import DocumentPrompts, Prompts, Resources, RunRequest, RunSpec, SelfStudyPrompts
from foundry.store.tags import TagRecord
from foundry.store.upkeep.retention import Collected

__all__ = [
    "ActiveRuns",
    "Ancestor",
    "ApiKey",
    "BatchFinal",
    "BatchRecord",
    "BatchState",
    "BatchStore",
    "CartridgeId",
    "CartridgeStore",
    "Checkpoints",
    "ClaimedRun",
    "Collected",
    "DatasetStore",
    "DatasetSummary",
    "Desired",
    "DocumentInfo",
    "DocumentPrompts",
    "DocumentStore",
    "FileInfo",
    "FileStore",
    "Grant",
    "GrantStore",
    "KeyStore",
    "Manifest",
    "ManifestDraft",
    "Objects",
    "Prompts",
    "Published",
    "Reference",
    "Resources",
    "Row",
    "RunRecord",
    "RunRequest",
    "RunSpec",
    "RunState",
    "RunStore",
    "SelfStudyPrompts",
    "StoreSettings",
    "TagRecord",
    "check_name",
    "check_new_name",
    "check_tag",
    "lineage",
]
