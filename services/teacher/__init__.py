"""The teacher: what the frozen model would have predicted with the whole document in its context."""

from foundry import extras

extras.require("model", extras.MODEL)
