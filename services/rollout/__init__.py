"""The rollout service: answers decoded with the frozen model behind the cartridges that a request names by digest."""

from foundry import extras

extras.require("model", extras.MODEL)
