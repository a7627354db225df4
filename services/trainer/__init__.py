"""The trainer: on-policy context distillation of one cartridge at a time."""

from foundry import extras

extras.require("model", extras.MODEL)
