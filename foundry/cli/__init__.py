"""The `foundry` command. Modules import what is heavy inside their functions: `foundry --help` loads neither torch nor
the gateway's client."""
