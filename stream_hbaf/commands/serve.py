"""The command serve: recognises the sound of many clients, which come and go."""

import argparse
import asyncio

from stream_hbaf.cluster import FOUND
from stream_hbaf.commands import (
    Commands,
    add_command,
    limit_library_caches,
    limit_library_threads,
)
from stream_hbaf.commands.live import add_settings, read_config


def add_serve_command(commands: Commands) -> None:
    """Add serve."""
    serve = add_command(
        commands, "serve", _serve, help="recognise the sound of clients that connect"
    )
    serve.add_argument("--host", metavar="ADDRESS", help="listen here (default: 127.0.0.1)")
    serve.add_argument("--port", metavar="PORT", help="listen here (default: 8772)")
    serve.add_argument(
        "--ray",
        nargs="?",
        const=FOUND,
        metavar="HOST:PORT",
        help="run the models on a Ray cluster (default: this machine's, or a new one)",
    )
    add_settings(serve)


def _serve(options: argparse.Namespace) -> None:
    config = read_config(options)
    limit_library_threads()
    limit_library_caches()
    from stream_hbaf.commands.run import serve

    asyncio.run(serve(config, json=options.json))
