"""The store: versioned cartridges, documents and runs, in object storage and Redis. No torch in here."""

from foundry.store.durable.checkpoints import Checkpoints
from foundry.store.durable.documents import DocumentInfo, DocumentStore
from foundry.store.durable.objects import Objects
from foundry.store.hot.pointers import Published
from foundry.store.lineage import Ancestor, lineage
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import CartridgeId, Reference, check_name, check_tag
from foundry.store.runs.record import ActiveRuns, ClaimedRun, Desired, RunRecord, RunState
from foundry.store.runs.spec import OBJECTIVES, DocumentPrompts, Prompts, Resources, RunSpec, SelfStudyPrompts
from foundry.store.runs.store import RunStore
from foundry.store.settings import StoreSettings
from foundry.store.store import CartridgeStore
from foundry.store.tag_record import TagRecord
from foundry.store.upkeep.sweep import Swept

__all__ = [
    "OBJECTIVES",
    "ActiveRuns",
    "Ancestor",
    "CartridgeId",
    "CartridgeStore",
    "Checkpoints",
    "ClaimedRun",
    "Desired",
    "DocumentInfo",
    "DocumentPrompts",
    "DocumentStore",
    "Manifest",
    "ManifestDraft",
    "Objects",
    "Prompts",
    "Published",
    "Reference",
    "Resources",
    "RunRecord",
    "RunSpec",
    "RunState",
    "RunStore",
    "SelfStudyPrompts",
    "StoreSettings",
    "Swept",
    "TagRecord",
    "check_name",
    "check_tag",
    "lineage",
]
