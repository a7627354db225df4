"""The whole system on one machine: model, private Valkey, services, one supervisor."""
