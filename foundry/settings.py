"""Settings: one frozen model per service, read from the command line and from FOUNDRY_* variables.

Every field carries its unit in its name and a docstring under it; the reference page and the chart's schema are made
from both. Unknown names are refused, and variables that are almost a setting's name.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from foundry import variables
from foundry.identity import Dtype
from foundry.rpc.access import Access, Role, token_of
from foundry.rpc.tls import Tls, tls_of
from foundry.telemetry.settings import TelemetrySettings


class ServiceSettings(TelemetrySettings, BaseSettings):
    """What every service takes. The command line wins over the environment."""

    model_config = SettingsConfigDict(
        env_prefix=variables.PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        # Errors name the setting; what was written there may be a secret.
        hide_input_in_errors=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        nested_model_default_partial_update=True,
    )

    listen: str = "127.0.0.1:0"
    """host:port to serve on; port 0 takes a free one."""

    tls_certificate_file: Path | None = None
    """This service's certificate (PEM) for mutual TLS with the other services, all three files or none. It is both the
    server's and the client's. Files that are renewed in place are read anew."""

    tls_key_file: Path | None = None
    """The certificate's private key (PEM, without a password)."""

    tls_ca_file: Path | None = None
    """Certificates (PEM) of the authority that every other service's certificate must come from."""

    rpc_tokens_directory: Path | None = None
    """Directory with a file for each role that may call a rollout server or teacher: `gateway`, `trainer`, `operator`.
    Each holds the role's token, 32 or more random characters. Rollout servers and teachers need all three and answer
    nobody else; gateway and trainer need their own. Unset: whoever reaches a port may call everything."""

    dry_run: bool = False
    """Print the resolved settings, without secrets, and exit."""

    @model_validator(mode="after")
    def _tls_files_belong_together(self) -> Self:
        if len({path is None for path in (self.tls_certificate_file, self.tls_key_file, self.tls_ca_file)}) > 1:
            raise ValueError(
                "tls_certificate_file, tls_key_file and tls_ca_file belong together: set all three or none"
            )
        return self

    @property
    def tls(self) -> Tls | None:
        """None where services talk without TLS. Raises InvalidArgument if a file can't be used."""
        if self.tls_certificate_file is None or self.tls_key_file is None or self.tls_ca_file is None:
            return None
        return tls_of(self.tls_certificate_file, self.tls_key_file, self.tls_ca_file)

    @property
    def access(self) -> Access | None:
        """None where everybody may call everything. Raises InvalidArgument if a file can't be used."""
        return None if self.rpc_tokens_directory is None else Access(self.rpc_tokens_directory)

    def token_of(self, role: Role) -> str | None:
        """What `role` shows to those it calls; None where nobody asks. Raises InvalidArgument."""
        return None if self.rpc_tokens_directory is None else token_of(role, self.rpc_tokens_directory)

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> Self:
        """Settings from `arguments` (default: the process's own) and the environment.

        With --dry-run prints them as JSON and exits with status 0. If one is wrong, says which and exits with status 2.
        """
        misspelt = list(variables.misspelt(cls))
        try:
            settings = CliApp.run(cls, cli_args=arguments)
        except ValidationError as error:
            _refuse(misspelt + [_line(path, message) for path, message in variables.faults(error, cls)])
        except SettingsError as error:
            _refuse([*misspelt, variables.unreadable(error)])
        if misspelt:
            _refuse(misspelt)
        if settings.dry_run:
            print(settings.model_dump_json(indent=2))
            raise SystemExit(0)
        return settings


class ModelSettings(ServiceSettings):
    """What every service takes that runs the frozen model."""

    model: Path
    """Directory of the frozen model (configuration, tokenizer, safetensors)."""

    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1, mps. Under torchrun `cuda` is the GPU of the process's local rank."""

    dtype: Dtype = "auto"
    """Numbers of the model, the same in all services: auto is bfloat16 on CUDA and float32 elsewhere."""

    template_clock: datetime = datetime(2024, 7, 26, tzinfo=UTC)
    """Date that the model's chat template writes where it would write today's, the same in all services: a document's
    context must not change overnight. Services that write different dates refuse each other's ids. The default is what
    Llama 3's own template writes where it has no clock."""

    reflection: bool = False
    """Tell tools such as grpcurl what can be called, by gRPC's reflection: for development. Where
    rpc_tokens_directory is set, they need the operator's token."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves its default."""


def _line(path: variables.Path, message: str) -> str:
    # What several settings have wrong together has no path.
    return f"{variables.variable(path)} ({variables.option(path)}): {message}" if path else message


def _refuse(faults: list[str]) -> NoReturn:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    raise SystemExit(2) from None
