"""Settings: one frozen model per service, read from the command line and from FOUNDRY_* variables.

Every field carries its unit in its name and a docstring under it; the reference page and the chart's schema are made
from both. Unknown keys are refused.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """What every service takes. The command line wins over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="FOUNDRY_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        # Errors name the setting; what was written there may be a secret.
        hide_input_in_errors=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        nested_model_default_partial_update=True,
    )

    listen: str = "127.0.0.1:0"
    """host:port to serve on; port 0 takes a free one."""

    metrics_port: int = 0
    """Port of /metrics; 0 serves none."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""

    dry_run: bool = False
    """Print the resolved settings, without secrets, and exit."""

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> Self:
        """Settings from `arguments` (default: the process's own) and the environment.

        With --dry-run prints them as JSON and exits with status 0.
        """
        settings = CliApp.run(cls, cli_args=arguments)
        if settings.dry_run:
            print(settings.model_dump_json(indent=2))
            raise SystemExit(0)
        return settings
