"""The store: versioned cartridges, documents and runs, in object storage and Redis. No torch in here."""

from foundry.store.checkpoints import Checkpoints
from foundry.store.documents import DocumentInfo, DocumentStore
from foundry.store.lineage import Ancestor, lineage
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import CartridgeId, Reference, check_name, check_tag
from foundry.store.objects import Objects
from foundry.store.pointers import Published
from foundry.store.run_record import ClaimedRun, Desired, RunRecord, RunState
from foundry.store.run_spec import OBJECTIVES, DocumentPrompts, Prompts, RunSpec, SelfStudyPrompts
from foundry.store.runs import RunStore
from foundry.store.settings import StoreSettings
from foundry.store.store import CartridgeStore
from foundry.store.sweep import Swept
from foundry.store.tag_record import TagRecord

__all__ = [
    "OBJECTIVES",
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
