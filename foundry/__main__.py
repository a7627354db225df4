"""python -m foundry: the command `foundry`, where it is not on the PATH."""

from foundry.cli.main import app

app()
