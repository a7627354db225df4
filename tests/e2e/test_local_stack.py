"""`foundry up` and what may happen to it: real processes, a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from filelock import FileLock

from foundry.client import FoundryClient
from foundry.errors import Conflict, FoundryError, InvalidArgument, PortTaken, Unavailable
from foundry.local import health, ports
from foundry.local.home import Home, StackState
from foundry.local.process import start_time
from foundry.local.stack import LocalStack
from foundry.rpc import probe
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.timeout(180)
WAIT_SECONDS = 60.0


def quiet(line: str) -> None:
    """Nobody reads the stages here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A FOUNDRY_HOME in which nothing runs when the test is over, whatever happened in it."""
    # With a space, as in macOS' directory for data, and whatever else may stand in a name.
    path = tmp_path / 'Application Support of "Zoë\'s" \\ 100%'
    yield path
    LocalStack(path, say=quiet).down()
    assert processes_of(path) == []


def processes_of(home: Path) -> list[str]:
    """Command lines of the processes that were started for `home`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            texts = [*process.cmdline(), *process.environ().values()]
            ours = any(str(home) in text or home.as_uri() in text for text in texts)
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def wait_gone(pid: int) -> None:
    """Return when the process has ended. Fails after a while."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(WAIT_SECONDS)


def foundry(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foundry.cli.main", *arguments],
        env={**os.environ, "FOUNDRY_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20_000, 30_000, count):
        with contextlib.ExitStack() as held, contextlib.suppress(PortTaken):
            for port in range(first, first + count):
                held.enter_context(ports.reserve(port))
            return first
    raise AssertionError("no ports are free")


def broken_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the rollout service of the next stack refuse its settings."""
    monkeypatch.setenv("FOUNDRY_MAX_SEQUENCES", "none at all")


def check_tokens(state: StackState, tokens: Path) -> None:
    """Each service has its own."""
    given = {
        name: psutil.Process(state.services[name].pid).environ()["FOUNDRY_RPC_TOKENS_DIRECTORY"]
        for name in ("gateway", "trainer", "teacher")
    }
    assert given == {name: str(tokens / name) for name in ("gateway", "trainer")} | {"teacher": str(tokens / "servers")}


def test_up_serves_and_down_leaves_nothing(
    home: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics_port = free_ports(4)
    monkeypatch.setenv("FOUNDRY_METRICS_PORT", str(metrics_port))
    stack = LocalStack(home, model, say=quiet)
    state = stack.up()
    assert set(state.services) == {"valkey", "teacher", "rollout", "trainer", "gateway"}
    assert all(asyncio.run(health.look(state, timeout_seconds=10)).values())
    with FoundryClient(state.gateway_url) as client:
        assert client.ready()["status"] == "ok"
        assert client.chat(client.models()[0]["id"], "What?", max_tokens=4, temperature=0.0).completion_tokens >= 1
    # One port of metrics for all would let one service start.
    for index, name in enumerate(["gateway", "rollout", "teacher", "trainer"]):
        assert state.services[name].metrics == f"127.0.0.1:{metrics_port + index}"
        served = httpx.get(f"http://{state.services[name].metrics}/metrics", trust_env=False).text
        assert f'foundry_build_info{{service="{name}"' in served
    # The file holds the password of Valkey, and no command line does.
    assert home.joinpath("stack.json").stat().st_mode & 0o777 == 0o600
    password = state.redis_url.partition("://:")[2].partition("@")[0]
    assert len(password) > 20
    assert not any(password in command for command in processes_of(home))

    # Nor do the services answer whoever reaches their ports: a drain would end the rollout server.
    assert probe.main(["--drain", "10", state.services["rollout"].address]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    check_tokens(state, Home(home).tokens)

    # A second one finds it running.
    assert LocalStack(home, say=quiet).up() == state
    assert foundry("up", home=home).stdout.strip() == state.gateway_url
    status = foundry("status", home=home)
    assert status.returncode == 0, status.stdout + status.stderr
    assert str(metrics_port) in status.stdout
    shown = json.loads(foundry("status", "--json", home=home).stdout)
    assert {service["serving"] for service in shown["services"].values()} == {True}
    assert password not in json.dumps(shown)
    # While somebody else is at it, it waits.
    command = [sys.executable, "-m", "foundry.cli.main", "up"]
    environment = {**os.environ, "FOUNDRY_HOME": str(home)}
    with (
        FileLock(Home(home).up_lock) as lock,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other,
    ):
        assert other.stderr is not None
        assert "waiting for it" in other.stderr.readline()
        lock.release()
        assert other.communicate(timeout=WAIT_SECONDS)[0].strip() == state.gateway_url
    # Asked for another model, or another port, it says so.
    with pytest.raises(Conflict, match="foundry down"):
        LocalStack(home, "demo", say=quiet).up()
    with pytest.raises(Conflict, match="another port"):
        LocalStack(home, port=1 + int(state.gateway_url.rpartition(":")[2]), say=quiet).up()
    # Nor does a second supervisor get in.
    command = [sys.executable, "-m", "foundry.local.supervisor", "--home", str(home)]
    command += ["--model", model, "--model-directory", model]
    second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another supervisor is at work" in second.stdout

    assert stack.down()
    assert processes_of(home) == []
    assert not home.joinpath("stack.json").exists()
    assert not stack.down()


def test_supervisor_and_service_that_are_killed(home: Path, model: str) -> None:
    first = LocalStack(home, model, say=quiet)
    killed = first.up()
    os.kill(killed.pid, signal.SIGKILL)
    for service in killed.services.values():
        wait_gone(service.pid)
    assert processes_of(home) == []
    # What it left behind is recognised, and a new one starts.
    assert Home(home).read() is not None
    assert Home(home).running() is None
    stack = LocalStack(home, model, say=quiet)
    before = stack.up()
    assert before.pid != killed.pid

    os.kill(before.services["rollout"].pid, signal.SIGKILL)
    wait_gone(before.services["rollout"].pid)
    with FoundryClient(before.gateway_url) as client:
        # The supervisor starts it, the gateway waits for it.
        answer = None
        while answer is None:
            with contextlib.suppress(Unavailable):
                answer = client.chat(client.models()[0]["id"], "What?", max_tokens=2, temperature=0.0)
    after = Home(home).running()
    assert after is not None
    assert after.services["rollout"].restarts == 1
    assert after.services["rollout"].pid != before.services["rollout"].pid
    assert after.services["rollout"].address == before.services["rollout"].address
    others = set(after.services) - {"rollout"}
    assert all(after.services[name] == before.services[name] for name in others)
    stack.down()
    # Reaps the supervisor that was killed.
    first.down()


def test_stack_of_a_killed_owner_ends(home: Path, model: str) -> None:
    """`with LocalStack()` in a process that is killed: no chance to clean up, and still nothing stays."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom foundry.local.stack import LocalStack\n"
        "with LocalStack(Path(sys.argv[1]), sys.argv[2]) as stack:\n    print('up', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(home), model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        state = Home(home).running()
        assert state is not None
        owner.kill()
    wait_gone(state.pid)
    assert processes_of(home) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Who runs the tests in the background may have them ignore SIGINT, and what is ignored is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_up_leaves_nothing(home: Path, model: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "foundry.cli.main", "up", "--model", model],
        env={**os.environ, "FOUNDRY_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as starting:
        assert starting.stderr is not None
        # Valkey is there, the others are on their way.
        while "valkey is ready" not in (line := starting.stderr.readline()):
            assert line, "up ended before it was interrupted"
        starting.send_signal(signal.SIGINT)
        starting.stderr.read()
        assert starting.wait(WAIT_SECONDS) != 0
    assert processes_of(home) == []
    assert not home.joinpath("stack.json").exists()


def test_service_that_cannot_start_fails_up_with_its_log(
    home: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_service(monkeypatch)
    with pytest.raises(Unavailable, match=r"rollout ended with status 2[\s\S]*rollout\.log[\s\S]*MAX_SEQUENCES"):
        LocalStack(home, model, say=quiet).up()
    assert processes_of(home) == []
    assert Home(home).running() is None


def test_port_that_is_taken_is_a_typed_error(home: Path, model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is taken"):
            LocalStack(home, model, port, say=quiet).up()
        refused = foundry("up", "--model", model, "--port", str(port), home=home)
        assert refused.returncode == 1
        assert f"error: port {port} is taken" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert processes_of(home) == []


@pytest.mark.parametrize("name", ["FOUNDRY_TLS_CA_FILE", "FOUNDRY_HTTPS_SERVER_KEY_FILE"])
def test_certificates_are_not_for_a_stack_on_loopback(
    home: Path, model: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "key.pem")
    with pytest.raises(InvalidArgument, match=f"{name} is set"):
        LocalStack(home, model, say=quiet).up()
    assert not home.exists()


TAKEN = ["stack.json/", "stack.json.new/", "up.lock/", "supervisor.lock/", "valkey.conf/", "logs", "objects"]


@pytest.mark.parametrize("taken", [*TAKEN, "logs/valkey.log.1/", "logs/supervisor.log.1/"])
def test_a_home_that_cannot_be_used_is_a_typed_error(home: Path, model: str, taken: str) -> None:
    """A directory where there should be a file, and the other way round: what the system refuses to root too."""
    obstacle = home / taken
    home.mkdir()
    if taken.endswith("/"):
        obstacle.mkdir(parents=True)
        # The log that would be put aside there.
        obstacle.with_suffix("").touch()
    else:
        obstacle.touch()
    up = foundry("up", "--model", model, home=home)
    shutil.rmtree(home)
    assert up.returncode == 1
    assert up.stderr.splitlines()[-1].startswith("error: cannot use ")
    assert str(home) in up.stderr.splitlines()[-1]
    assert "Traceback" not in up.stderr


def test_pid_of_another_process_is_not_taken_for_the_stack(home: Path) -> None:
    """After a restart of the machine the pid in stack.json may be anybody's."""
    place = Home(home)
    place.create()
    state = StackState(
        pid=os.getpid(),
        start_time=start_time(psutil.Process()),
        state="ready",
        model="demo",
        model_directory="/",
        gateway_url="http://127.0.0.1:1",
        objects_url="file:///",
        redis_url="redis://",
    )
    place.write(state)
    assert place.running() == state
    state.start_time -= 1
    place.write(state)
    assert place.read() == state
    assert place.running() is None
    # And it is not stopped instead: this test goes on.
    assert not LocalStack(home, say=quiet).down()


def test_damaged_state_file_is_no_stack(home: Path) -> None:
    place = Home(home)
    place.create()
    for content in ("", "{", "[]", '{"pid": 1}'):
        place.state_file.write_text(content)
        assert place.read() is None


def test_url_of_a_stack_that_is_not_up(home: Path) -> None:
    with pytest.raises(FoundryError, match="foundry up"):
        _ = LocalStack(home, say=quiet).url
