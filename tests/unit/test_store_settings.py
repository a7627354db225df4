"""Settings of the store: what fits together, and that no secret is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from foundry.errors import InvalidArgument
from foundry.settings import ServiceSettings
from foundry.store import StoreSettings
from foundry.store.credentials import RedisAccess, S3Access
from services.gateway.settings import GatewaySettings
from services.rollout.settings import RolloutSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

PLANTED = "planted-secret"
PLACES = {"redis_url": "redis://h:6379/0", "objects_url": "s3://bucket/prefix"}


def settings(**values: Any) -> StoreSettings:
    return StoreSettings.model_validate(PLACES | values)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        (f"redis://user:{PLANTED}@h:6379/0", "redis://user:**********@h:6379/0"),
        (f"rediss://:{PLANTED}@h", "rediss://:**********@h"),
        (f"redis://user:{PLANTED}@and/more?#:@h", "redis://user:**********@h"),
        (f"redis://h/0?password={PLANTED}&db=1", "redis://h/0?password=**********&db=1"),
        (f"unix:///run/redis.sock?ssl_password={PLANTED}", "unix:///run/redis.sock?ssl_password=**********"),
        (PLANTED, "**********"),
        (f"http://user:{PLANTED}@h", "**********"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    found = settings(redis_url=url)
    assert found.redis_url.get_secret_value() == url
    assert json.loads(found.model_dump_json())["redis_url"] == shown
    for text in (repr(found), str(found), found.model_dump_json(), repr(found.model_dump()), f"{found.redis_url}"):
        assert PLANTED not in text
        assert shown in text or text == str(found.redis_url)


SECRETS = ("redis_password", "objects_access_key_id", "objects_secret_access_key", "objects_session_token")


def test_secrets_are_not_shown() -> None:
    found = settings(**dict.fromkeys(SECRETS, PLANTED))
    access = (S3Access.of(found), RedisAccess.of(found))
    assert access[0].secret_access_key == PLANTED
    for text in (repr(found), found.model_dump_json(), repr(found.model_dump()), repr(access)):
        assert PLANTED not in text


def test_secrets_come_from_files_without_the_line_end(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{PLANTED}\r\n")
    found = settings(**{f"{name}_file": file for name in SECRETS})
    s3 = S3Access.of(found)
    assert (s3.access_key_id, s3.secret_access_key, s3.session_token) == (PLANTED, PLANTED, PLANTED)
    assert RedisAccess.of(found).options["password"] == PLANTED
    file.unlink()
    for access in (S3Access, RedisAccess):
        with pytest.raises(InvalidArgument, match="can't be read: No such file"):
            access.of(found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict.fromkeys(("redis_password", "redis_password_file"), PLANTED), "both set"),
        ({"objects_access_key_id": PLANTED}, "belong together"),
        ({"objects_session_token": PLANTED}, "belong together"),
        ({"redis_key_file": "/key"}, "belong together"),
        ({"objects_url": f"s3://{PLANTED}:{PLANTED}@bucket"}, "credentials don't belong"),
        ({"objects_url": f"az://container?sig={PLANTED}"}, "credentials don't belong"),
        ({"objects_url": f"ftp://{PLANTED}"}, "expected file://"),
        ({"objects_url": "gs://bucket", "objects_region": PLANTED}, "are for s3"),
        ({"objects_url": "file:///x", "objects_allow_http": True}, "are for s3"),
        ({"redis_pasword": PLANTED}, "Extra inputs"),
        ({"redis_timeout_seconds": PLANTED}, "valid number"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_shown(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        settings(**values)
    assert PLANTED not in str(caught.value)
    assert PLANTED not in repr(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"redis_url": PLANTED}, "redis_url"),
        ({"redis_url": f"redis://user:{PLANTED}/x@h:port"}, "redis_url"),
        ({"redis_url": f"redis://h:{PLANTED}"}, "redis_url"),
        ({"redis_url": f"http://:{PLANTED}@h"}, "redis_url"),
        ({"redis_url": f"redis://[{PLANTED}"}, "redis_url"),
        ({"redis_url": f"redis://h?password={PLANTED}"}, "redis_url"),
        ({"redis_url": f"redis://h?max_connections={PLANTED}"}, "redis_url"),
        ({"redis_url": f"redis://u:{PLANTED}@h", "redis_password": PLANTED}, "redis_password"),
        ({"redis_url": f"redis://u:{PLANTED}@h", "redis_username": "u"}, "redis_username"),
        ({"redis_ca_file": "/ca.pem"}, "redis_ca_file"),
        ({"redis_url": "rediss://h", "redis_ca_file": "/no/ca.pem"}, "redis_ca_file"),
    ],
)
def test_a_redis_that_cannot_be_meant_is_refused_and_not_shown(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RedisAccess.of(settings(**values))
    assert caught.value.field == field
    error: BaseException | None = caught.value
    assert PLANTED not in repr(error)
    assert error is not None
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def test_places_of_redis() -> None:
    unix = RedisAccess.of(settings(redis_url="unix:///run/redis.sock?db=2"))
    assert (unix.transport, unix.options) == ("unix", {"path": "/run/redis.sock", "db": 2})
    tcp = RedisAccess.of(settings(redis_url="redis://u%40x:p%2Fw@h:1/3"))
    assert tcp.options == {"host": "h", "port": 1, "db": 3, "username": "u@x", "password": "p/w"}
    assert RedisAccess.of(settings(redis_url="rediss://h")).transport == "tls"


@pytest.mark.parametrize(
    ("service", "arguments"),
    [
        (GatewaySettings, []),
        (RolloutSettings, ["--model", "/m"]),
        (TeacherSettings, ["--model", "/m"]),
        (TrainerSettings, ["--model", "/m"]),
    ],
)
def test_a_dry_run_shows_no_secret(
    service: type[ServiceSettings],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "store" in service.model_fields:
        monkeypatch.setenv("FOUNDRY_STORE__REDIS_URL", f"redis://user:{PLANTED}@h:6379/0")
        monkeypatch.setenv("FOUNDRY_STORE__OBJECTS_URL", "s3://bucket")
        for name in SECRETS:
            monkeypatch.setenv(f"FOUNDRY_STORE__{name.upper()}", PLANTED)
    with pytest.raises(SystemExit) as ended:
        service.parse([*arguments, "--dry-run"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert PLANTED not in printed.out + printed.err
    if "store" in service.model_fields:
        store = json.loads(printed.out)["store"]
        assert store["redis_url"] == "redis://user:**********@h:6379/0"
        assert store["objects_secret_access_key"] == "**********"
