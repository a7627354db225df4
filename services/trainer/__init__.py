"""The trainer: on-policy context distillation of one cartridge at a time."""
