"""The page on this machine alone: what comes in is limited, what was sent is deleted, and nothing goes out."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would tell its makers of the import, too

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from applications.openvclip.page.app import Page, blocks
from applications.openvclip.page.drawing import CSS

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

KEPT_S = 600
"""Seconds that an upload stays on the disk; the browser plays it from there."""

_MAX_BYTES = 1 << 20
"""Of a request that uploads nothing."""

_SANS = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]  # none is fetched from anywhere


class OnlyUploads:
    """Middleware: files are those that were uploaded here, and never a URL that this machine is asked to fetch.

    Gradio takes a path in a request for an upload of its own, and refuses others; a URL it downloads.
    """

    def __init__(self, app: _App) -> None:
        self.app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if "proxy=" in path or ("file=" in path and _is_url(path.partition("file=")[2])):
            return await PlainTextResponse("No file from elsewhere.", 403)(scope, receive, send)
        if scope["method"] != "POST" or path.endswith("/upload"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _MAX_BYTES:
                return await PlainTextResponse("Too long.", 413)(scope, receive, send)
        if _names_url(body):
            return await PlainTextResponse("No file from elsewhere.", 403)(scope, receive, send)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> _Message:
            return next(messages, None) or await receive()

        await self.app(scope, again, send)


def _is_url(path: str) -> bool:
    return "://" in path or path.lower().startswith(("http:", "https:"))


def _names_url(body: bytes) -> bool:
    """Whether some file in a request's JSON is a URL."""
    try:
        left = [json.loads(body)]
    except ValueError:
        return False  # it is refused where it is needed
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str) and _is_url(value["path"]):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


@contextmanager
def serving(page: Page, *, port: int | None, max_mb: float) -> Iterator[str]:
    """Serve a page until the block ends; then every upload is gone.

    Args:
        page: What to serve.
        port: Of 127.0.0.1; by default one that is free, from 7860 on.
        max_mb: Megabytes that an upload may have.

    Yields:
        Its address.

    Raises:
        OSError: The port is taken.
    """
    with TemporaryDirectory(prefix="openvclip-uploads-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = blocks(page, Path(folder), KEPT_S)
        app.queue(default_concurrency_limit=4)
        _, address, _ = app.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=int(max_mb * 1e6),
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            state_session_capacity=200,
            theme=gr.themes.Soft(primary_hue="orange", neutral_hue="slate", font=_SANS, font_mono=["monospace"]),
            css=CSS,
            app_kwargs={
                "middleware": [
                    # a page elsewhere whose name is turned to this machine would otherwise pass for this one
                    Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                    Middleware(OnlyUploads),
                ]
            },
        )
        try:
            yield address
        finally:
            app.close()
