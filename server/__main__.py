"""python -m server: settings -> port -> engine -> uvicorn."""

import logging
import os
import ssl
import sys
from typing import TYPE_CHECKING

from pydantic_settings import SettingsError

from server.settings import Settings, load_settings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from server.engine.engine import Engine
    from server.engine.loading import Report

KEEP_ALIVE = 5  # seconds that a connection may be idle between requests
FLUSH_TIMEOUT = 5  # seconds to send what is left when the server ends


def main() -> int:
    """Serve until told to end. Returns 2 for a wrong option, 1 for a model that cannot be served or an engine that broke."""
    try:
        settings = load_settings(sys.argv[1:])
    except SettingsError as error:
        return _fail(str(error), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    # Loading these takes seconds, too long for --help or a typing error.
    from server.app import create_app
    from server.lifecycle import Lifecycle
    from server.listener import Listener, bind

    app = create_app(lambda report: _load(settings, report), settings)
    life: Lifecycle = app.state.life
    config = _uvicorn_config(app, settings)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        return _fail(f"cannot use {settings.ssl_certfile} and its key for TLS: {error.strerror or error}", 2)
    try:
        listening = bind(settings.host, settings.port)
    except OSError as error:
        return _fail(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}", 1)
    Listener(config, life).run([listening])
    status = 0 if life.error is None else _fail(life.error, 1)
    if life.busy:
        # Ending the interpreter under a thread that computes can crash, and waiting for it may take for ever.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status


def _load(settings: Settings, report: "Report") -> "Engine":
    from server.engine.engine import Engine  # in the thread that loads: importing all models of transformers takes seconds
    from server.engine.host import keep_what_is_loaded

    config = settings.engine_config()
    logging.info("starting %s: target %s, draft %s", settings.model_name, config.model, config.draft or "none")
    engine = Engine.from_config(config, report)
    keep_what_is_loaded()
    return engine


def _uvicorn_config(app: "FastAPI", settings: Settings) -> "uvicorn.Config":
    import uvicorn

    from server.gate import MAX_HEADER_BYTES
    from server.listener import Connection

    class LimitedConnection(Connection):
        client_timeout = settings.client_timeout

    return uvicorn.Config(
        app,
        http=LimitedConnection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=FLUSH_TIMEOUT,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        server_header=False,
    )


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
