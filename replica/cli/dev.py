"""`trustlog-replica dev`: a whole cluster as child processes of one terminal.

Each child has its own process group, so a Ctrl-C reaches this program alone, which then sends SIGTERM to each
child by its process id and waits. Nothing restarts a child: that one ended is what its developer must see.
"""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile, load_any_cluster_file, log_kind_label
from replica.cluster.home import LOG_NAME, SETTINGS_NAME, STARTED_NAME, read_log_public_key
from replica.cluster.memberlists import load_any_present_cluster
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.pbft import BASELINE, NO_LOGS
from replica.cluster.provision import DEFAULT_APPLICATION, init_cluster, replica_folder_name
from replica.cluster.replicatoml import load_settings
from replica.cluster.strict_toml import ConfigError
from replica.core.genesis import Ordering
from trustlog import BackendKind
from trustlog.cli.contract import SCHEMA_VERSION, CommandError, Exit, printable

STOP_SECONDS: Final = 15.0
LINE_BYTES_MAX: Final = 64 * 1024
_COLOURS: Final = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green")


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """What to start, and the label before each line of its output."""

    label: str
    arguments: tuple[str, ...]


class Screen:
    """What the developer sees: prefixed lines, or with `as_json` one JSON document per line.

    `failure` is what made writing to it impossible, such as a reader that went away.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.failure: OSError | None = None
        self._as_json = as_json
        self._coloured = not as_json and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def banner(
        self, directory: Path, cluster: ClusterFile, *, temporary: bool, http_base_port: int | None = None
    ) -> None:
        """Say what is being run and what to type in another terminal."""
        command = f"{_client_program()} -c {shlex.quote(str(directory))}"
        if self._as_json:
            replicas = [{"number": place.number, "address": place.address} for place in cluster.replicas]
            self._document(
                event="started",
                directory=str(directory),
                temporary=temporary,
                cluster_id=cluster.cluster_id.hex(),
                replicas=replicas,
            )
            return
        genesis = cluster.genesis
        note = " (temporary: removed at the end)" if temporary else ""
        self._print(f"{genesis.n} replicas, f = {genesis.f}, {genesis.ordering.label}, {genesis.application}")
        if not cluster.has_logs:
            self._print(f"warning: {BASELINE}")
        if any(member.log_kind == BackendKind.PROCESS for member in genesis.members):
            self._print("each replica's log is a process of its own, under the same user: fine for trying things out")
        self._print(f"cluster in {printable(str(directory))}{note}")
        self._print("In another terminal:")
        for use in _uses(genesis.application):
            self._print(f"    {printable(command)} {use}")
        if http_base_port is not None:
            self._print(f"    curl http://127.0.0.1:{http_base_port}/status    # the next replicas: the next ports")
        self._print("Ctrl-C ends all of it.")
        self._print("")

    def line(self, number: int, label: str, text: str) -> None:
        """Show one line of a child's output, its control characters as visible escapes."""
        if self._as_json:
            self._document(event="log", child=label, line=text)
        else:
            self._print(f"{self._styled(label, number)} | {printable(text)}")

    def ended(self, label: str, status: str, *, expected: bool) -> None:
        """Say that a child ended; loudly if nobody asked it to."""
        if self._as_json:
            self._document(event="ended", child=label, status=status, expected=expected)
        elif expected:
            self._print(f"{label} {status}")
        else:
            by_itself = " by itself" if status.startswith("exited") else ""
            text = f"*** {label} {status}{by_itself}, and is not started again ***"
            self._print(click.style(text, fg="red", bold=True) if self._coloured else text)

    def note(self, text: str) -> None:
        """Say something of our own."""
        if self._as_json:
            self._document(event="note", text=text)
        else:
            self._print(printable(text))

    def _styled(self, label: str, number: int) -> str:
        return click.style(label, fg=_COLOURS[number % len(_COLOURS)]) if self._coloured else label

    def _document(self, **fields: object) -> None:
        self._print(json.dumps({"schema_version": SCHEMA_VERSION, **fields}))

    def _print(self, text: str) -> None:
        if self.failure is not None:
            return
        try:
            click.echo(text)
        except OSError as error:
            self.failure = error


def run_development_cluster(
    directory: Path | None,
    *,
    f: int,
    base_port: int,
    ordering: Ordering,
    application: str,
    as_json: bool,
    http_base_port: int | None = None,
    log_backend: str = "process",
    given: Collection[str] = (),
    passphrase_file: Path | None = None,
) -> Exit:
    """Make the cluster if need be and run it until a signal; NEGATIVE if every replica ended by itself.

    `given` names the options that somebody asked for: a cluster that exists must be like that. ConfigError if the
    cluster cannot be made or read, CommandError if it is another than was asked for. http_base_port: where the first
    replica answers HTTP on loopback, if they should; the next have the ports that follow. passphrase_file: of the
    private keys, also of those that are made; nobody is asked, as the replicas have no terminal.
    """
    screen = Screen(as_json=as_json)
    with contextlib.ExitStack() as stack:
        root: Path | None = None
        if directory is None:
            root = Path(tempfile.mkdtemp(prefix="trustlog-dev-"))
            stack.callback(shutil.rmtree, root, ignore_errors=True)
        home = root / "cluster" if root else (directory or Path())
        if root or not (home / CLUSTER_FILE_NAME).exists():
            kind = BackendKind[log_backend.upper()]
            passphrase = PassphraseSource(passphrase_file).given()
            cluster = init_cluster(
                home,
                f=f,
                base_port=base_port,
                ordering=ordering,
                application=application,
                log_kind=kind,
                passphrase=None if passphrase is None else passphrase.secret,
            )
        else:
            cluster = load_any_cluster_file(home)
            wanted = {
                "--f": f,
                "--base-port": base_port,
                "--ordering": ordering.label,
                "--app": application,
                "--log-backend": log_backend,
            }
            _check_not_started(home, cluster)
            _check_like(home, cluster, {option: value for option, value in wanted.items() if option in given})
        if http_base_port is not None and not cluster.has_logs:
            raise CommandError(f"--http-base-port: {NO_LOGS}", exit_code=Exit.USAGE, code="configuration")
        present = load_any_present_cluster(home)
        screen.banner(home, present, temporary=root is not None, http_base_port=http_base_port)
        children = [
            _replica_command(
                member_folder(home, present, place.number),
                place.number,
                as_json=as_json,
                http_base_port=http_base_port,
                passphrase_file=passphrase_file,
            )
            for place in present.replicas
        ]
        stopped = asyncio.run(_until_signal(children, screen))
        if screen.failure is not None:
            raise screen.failure
        if stopped:
            return Exit.OK
        if root is not None:
            stack.pop_all()
            screen.note(f"all replicas ended; {home} is kept so that you can look into it")
        return Exit.NEGATIVE


async def run_children(
    children: Sequence[ChildCommand],
    screen: Screen,
    stop: asyncio.Event,
    *,
    stop_seconds: float = STOP_SECONDS,
) -> bool:
    """Run the children until `stop` is set or all have ended; say whether `stop` was it.

    Then those that still run get SIGTERM, and SIGKILL when they have not ended within `stop_seconds`.
    """
    processes: list[asyncio.subprocess.Process] = []
    watchers: list[asyncio.Task[None]] = []
    stopped = asyncio.ensure_future(stop.wait())
    try:
        for number, child in enumerate(children):
            process = await _start(child)
            processes.append(process)
            watchers.append(asyncio.create_task(_watch(number, child.label, process, screen, stop)))
        waiting: set[asyncio.Future[Any]] = {*watchers}
        while waiting and not stop.is_set():
            done, _ = await asyncio.wait({stopped, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting -= done
        return stop.is_set()
    finally:
        stop.set()
        stopped.cancel()
        await _end(processes, watchers, screen, stop_seconds)


def _check_not_started(home: Path, cluster: ClusterFile) -> None:
    """Refuse a PBFT cluster that ran: its replicas would refuse one by one."""
    folders = [home / replica_folder_name(place.number) for place in cluster.replicas]
    if not cluster.has_logs and any((folder / STARTED_NAME).exists() for folder in folders):
        raise CommandError(
            f"{home}: this PBFT cluster ran before, and keeps nothing of it: it cannot be started again",
            "name a new directory",
            Exit.USAGE,
            code="configuration",
        )


def _check_like(home: Path, cluster: ClusterFile, wanted: Mapping[str, object]) -> None:
    """Refuse to run a cluster under options that it was not made with; CommandError names the first difference."""
    genesis = cluster.genesis
    found: dict[str, object] = {
        "--f": genesis.f,
        "--ordering": genesis.ordering.label,
        "--app": genesis.application,
        "--base-port": cluster.replicas[0].port,
        "--log-backend": log_kind_label(genesis.members[0].log_kind) if cluster.has_logs else "none",
    }
    for option, value in wanted.items():
        # Base port 0 leaves the choice to the system, which has chosen.
        if value != found[option] and (option, value) != ("--base-port", 0):
            raise CommandError(
                f"{home} holds a cluster with {option} {found[option]}, not {value}; this cannot be changed",
                f"leave {option} out to run it as it is, or name a new directory",
                Exit.USAGE,
                code="configuration",
            )


def _uses(application: str) -> tuple[str, ...]:
    """Return what may be typed after the client's name, for an application."""
    if application == DEFAULT_APPLICATION:
        return ("put greeting hello", "get greeting")
    return (f"exec OPERATION    # an operation of {printable(application)}",)


async def _until_signal(children: Sequence[ChildCommand], screen: Screen) -> bool:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return await run_children(children, screen, stop)


async def _start(child: ChildCommand) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *child.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Out of the terminal's process group: Ctrl-C is ours to pass on.
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        raise CommandError(
            f"{child.label} cannot be started: {error}", "free memory or processes, and try again"
        ) from error


async def _watch(
    number: int, label: str, process: asyncio.subprocess.Process, screen: Screen, stop: asyncio.Event
) -> None:
    async for line in _lines(process):
        screen.line(number, label, line)
        if screen.failure is not None:
            stop.set()  # read on without showing it, or the child could wait for us for ever
    code = await process.wait()
    screen.ended(label, _status(code), expected=stop.is_set())


async def _lines(process: asyncio.subprocess.Process) -> AsyncIterator[str]:
    """Yield the child's output by lines; a longer one than LINE_BYTES_MAX comes in pieces."""
    stream = process.stdout
    rest = b""
    while stream is not None and (chunk := await stream.read(LINE_BYTES_MAX)):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) >= LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="backslashreplace")
    if rest:
        yield rest.decode(errors="backslashreplace")


async def _end(
    processes: Sequence[asyncio.subprocess.Process],
    watchers: Sequence[asyncio.Task[None]],
    screen: Screen,
    stop_seconds: float,
) -> None:
    """End what still runs; when this returns, none of our children is left."""
    running = [process for process in processes if process.returncode is None]
    _signal(running, signal.SIGTERM)
    waiting = [asyncio.create_task(process.wait()) for process in running]
    if waiting:
        await asyncio.wait(waiting, timeout=stop_seconds)
    stuck = [process for process in running if process.returncode is None]
    if stuck:
        screen.note(f"{len(stuck)} did not end within {stop_seconds:g} s of SIGTERM and get SIGKILL")
        _signal(stuck, signal.SIGKILL)
        await asyncio.wait(waiting)
    # A grandchild may hold the pipe open; its output is no reason to stay.
    if watchers:
        _, unfinished = await asyncio.wait(watchers, timeout=1.0)
        for watcher in unfinished:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


def _signal(processes: Sequence[asyncio.subprocess.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _status(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def member_folder(directory: Path, cluster: ClusterFile, number: int) -> Path:
    """Return the folder, directly in a cluster's directory, of the replica that has a number in a list of members.

    It has the name that `init` gives, unless another replica took its place. If none has the member's log, it is that
    one: then whoever starts it is told why.
    """
    first = directory / replica_folder_name(number)
    others = sorted(path.parent for path in directory.glob(f"*/{SETTINGS_NAME}") if path.parent != first)
    for folder in (first, *others):
        with contextlib.suppress(ConfigError):
            log = read_log_public_key(folder / LOG_NAME)
            if (
                load_settings(folder / SETTINGS_NAME).number == number
                and log == cluster.genesis.members[number].log_public_key
            ):
                return folder
    return first


def _replica_command(
    folder: Path,
    number: int,
    *,
    as_json: bool,
    http_base_port: int | None = None,
    passphrase_file: Path | None = None,
) -> ChildCommand:
    program = [sys.executable, "-m", "replica.cli.main", "run", str(folder)]
    http = () if http_base_port is None else ("--http", f"127.0.0.1:{http_base_port + number}")
    passphrase = () if passphrase_file is None else ("--passphrase-file", str(passphrase_file))
    return ChildCommand(folder.name, (*program, *http, *passphrase, "--log-format", "json" if as_json else "console"))


def _client_program() -> str:
    """Return how to call the client: by its name if that is found, else by its full path."""
    name = "trustlog-client"
    beside = Path(sys.executable).with_name(name)
    return shlex.quote(str(beside)) if shutil.which(name) is None and beside.exists() else name
