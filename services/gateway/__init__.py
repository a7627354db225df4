"""The REST gateway: OpenAI's API over rollout servers, and documents, runs and cartridges of the store."""

from foundry import extras

extras.require("gateway", extras.GATEWAY)
