"""python -m server: settings -> engine -> uvicorn."""

import logging
import sys

from pydantic_settings import SettingsError

from server.engine.config import EngineError
from server.settings import load_settings


def main() -> int:
    """Serve until interrupted. Returns 2 for a wrong option, 1 for a model that cannot be served."""
    try:
        settings = load_settings(sys.argv[1:])
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = settings.engine_config()
    logging.info("starting %s: target %s, draft %s", settings.model_name, config.model, config.draft or "none")

    # Loading these takes seconds, too long for --help or a typing error.
    import uvicorn

    from server.app import create_app
    from server.engine.engine import Engine

    try:
        engine = Engine.from_config(config)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    logging.info("loaded; a request holds at most %d tokens", engine.max_request_tokens)
    uvicorn.run(create_app(engine, settings), host=settings.host, port=settings.port, timeout_graceful_shutdown=30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
