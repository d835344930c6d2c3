"""Serving the page of `coatkit demo`: one process, one port, uploads in a folder that goes away with it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from coatkit.demo import page
from coatkit.demo.asking import Asker
from coatkit.demo.guard import Guard
from coatkit.errors import RunError

LOCAL = ("127.0.0.1", "localhost", "::1")
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound already, so that a port that is taken is told before a model is loaded.

    Args:
        port: 0 for any that is free.

    Raises:
        RunError: If it cannot be had.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise _taken(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(64)
    except OSError as error:
        bound.close()
        raise _taken(host, port, error) from None
    return bound


def _taken(host: str, port: int, error: Exception) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(f"{host}:{port}: cannot be listened on ({reason}); name another with --port or --host")


def address_of(bound: socket.socket, host: str) -> str:
    """The page's address for a browser on this machine."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}/"


def hosts_of(bound: socket.socket, host: str) -> frozenset[str] | None:
    """Names that the page may be asked for by; any where it is open on all of a machine's addresses."""
    if host in ("0.0.0.0", "::", ""):
        return None
    port = bound.getsockname()[1]
    names = ("127.0.0.1", "localhost", "[::1]") if host in LOCAL else (f"[{host}]" if ":" in host else host.lower(),)
    return frozenset([*(f"{name}:{port}" for name in names), *(names if port == 80 else ())])


def application(asker: Asker, folder: Path, hosts: frozenset[str] | None) -> Any:
    """The page as an ASGI application.

    Args:
        folder: For uploads, and for nothing else.

    Raises:
        PluginError: If gradio is not installed.
    """
    # gradio reads these when it is imported and when its application is made.
    os.environ.update(_QUIET)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    gr = page.gradio()
    blocks = page.build(asker, folder)
    outer = import_module("fastapi").FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        outer,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        max_file_size=asker.limits.bytes,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=page.theme(),
        css=page.style(asker.limits),
    )
    return Guard(outer, folder, asker.limits.bytes, hosts, frozenset(blocks.fns))


def serve(asker: Asker, bound: socket.socket, host: str, say: Callable[[str], None] = print) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        bound: From `listen`.
        say: Is told the address, once it can be opened.

    Raises:
        PluginError: If gradio is not installed.
    """
    page.gradio()
    uvicorn = import_module("uvicorn")
    with _ended_by_term(), tempfile.TemporaryDirectory(prefix="coatkit-demo-") as folder:
        made = application(asker, Path(folder), hosts_of(bound, host))
        config = uvicorn.Config(
            made,
            log_level="warning",
            limit_concurrency=64,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            server_header=False,
            proxy_headers=False,
            ws="none",
        )
        say(f"{asker.name} is at {address_of(bound, host)} (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[bound])


@contextmanager
def _ended_by_term() -> Iterator[None]:
    """SIGTERM, and closing the terminal, end the process as Ctrl-C does, so that uploads are deleted."""

    def end(number: int, frame: Any) -> None:
        sys.exit(0)

    ending = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, end) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
