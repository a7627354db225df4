"""The SDK: clients of the gateway, one that waits and one for asyncio, with the same methods.

Failures are raised as the types of `foundry.errors` that the services raised.
"""

from foundry.client.aio import AsyncChatStream, AsyncFoundry, AsyncTraining
from foundry.client.answer import CartridgeVersion, ChatAnswer
from foundry.client.sync import ChatStream, Foundry, Training
from foundry.client.types import (
    AncestorJson,
    CartridgeJson,
    DatasetJson,
    DatasetRowJson,
    DocumentJson,
    EventJson,
    GrantJson,
    HeaderJson,
    ModelJson,
    RunJson,
    TagJson,
    VersionJson,
)

# The name that `Foundry` had before there was the other.
FoundryClient = Foundry

__all__ = [
    "AncestorJson",
    "AsyncChatStream",
    "AsyncFoundry",
    "AsyncTraining",
    "CartridgeJson",
    "CartridgeVersion",
    "ChatAnswer",
    "ChatStream",
    "DatasetJson",
    "DatasetRowJson",
    "DocumentJson",
    "EventJson",
    "Foundry",
    "FoundryClient",
    "GrantJson",
    "HeaderJson",
    "ModelJson",
    "RunJson",
    "TagJson",
    "Training",
    "VersionJson",
]
