"""The server of the page: local by default, nothing from other hosts, no large request."""

import asyncio
import importlib
import ipaddress
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from utils.app.arguments import AppArguments
from utils.app.context import ADVICE, BELOW_LABEL
from utils.app.jobs import Jobs
from utils.app.kept_files import kept_folder, trim
from utils.app.page import build_page
from utils.app.uploads import MB
from utils.options import import_extra

# What the browser may load and send: nothing from or to another host. Gradio's own scripts and styles are inline.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
CSS = f"""
/* Sheets have headings, which labels would cover. */
.{BELOW_LABEL} .image-container {{ padding-top: 2rem; }}
/* Names of checkpoints are long: they end before the arrow of their list. */
.gradio-container input[role=combobox] {{ box-sizing: border-box; padding-right: 2rem; text-overflow: ellipsis; }}
.gradio-container .main.app {{ max-width: min(100%, 1280px); }}
.{ADVICE} pre, .{ADVICE} code {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
"""
OVERHEAD = 100_000  # bytes of a request beside an uploaded file
CLOSE_SECONDS = 20.0  # So long is waited for jobs and for the server, each, when the page is closed.
HANG_UP_SECONDS = 1
JOIN, UPLOAD = "/queue/join", "/upload"  # The paths under which jobs are started and files are sent.
POLL_SECONDS = 0.1

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware: refuses large requests and foreign names of this host, says in our words that too many wait,
    deletes old uploads, and adds `HEADERS` to answers.

    Args:
        app: what answers.
        max_bytes: of the body of a request.
        max_waiting: jobs that may wait, for the message.
        max_kept: bytes of uploads and results.
        hosts: names under which the server answers; empty: all. A page of another host whose name leads here, by a
            changed DNS entry, could otherwise use it.
    """

    def __init__(self, app: Any, max_bytes: int, max_waiting: int, max_kept: int, hosts: frozenset[str]):
        self.app, self.hosts = app, hosts
        self.max_bytes, self.max_waiting, self.max_kept = max_bytes, max_waiting, max_kept

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.hosts and host_name(headers.get(b"host", b"").decode("latin-1")) not in self.hosts:
            return await refuse(send, 400, "the page is not served under this name; use that of --host")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return await refuse(send, 413, f"a request may have {self.max_bytes} bytes; see --max_upload_mb")
        n_bytes, is_answered = 0, False

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            # A request without a length is cut off.
            return message if n_bytes <= self.max_bytes else {"type": "http.disconnect"}

        async def with_headers(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                # Browsers show Gradio's own words where its queue is full, which it answers by 503.
                if message["status"] == 503 and scope["path"].endswith(JOIN):
                    is_answered = True
                    return await refuse(
                        send,
                        429,
                        f"as many jobs wait as --queue_size allows ({self.max_waiting}); try again in a minute",
                        as_json=True,
                    )
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            if not is_answered:
                await send(message)

        await self.app(scope, limited, with_headers)
        # The next upload, or the next job, deletes what results of jobs exceed.
        if scope["path"].endswith((UPLOAD, JOIN)):
            await asyncio.to_thread(trim, kept_folder(), self.max_kept)


async def refuse(send: Send, status: int, text: str, *, as_json: bool = False) -> None:
    """Answer a request with a status and a text, which scripts of the page read as JSON."""
    kind = b"application/json" if as_json else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": (json.dumps({"detail": text}) if as_json else text).encode()})


def host_name(host: str) -> str:
    """The name of a Host header, without the port."""
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host


def known_hosts(host: str) -> frozenset[str]:
    """Names under which a server that listens on `host` answers; none are checked where other machines reach it."""
    is_local = host == "localhost"
    if not is_local:
        try:
            is_local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            return frozenset()
    return frozenset((host, "localhost", "127.0.0.1", "[::1]")) if is_local else frozenset()


def pass_proxies(host: str) -> None:
    """Let requests to this machine pass proxies that the environment names: Gradio asks its own server at its start,
    and waits for the answer without an end."""
    for name in ("no_proxy", "NO_PROXY"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", "127.0.0.1", host]))


def theme(gr: Any) -> Any:
    """Colours and fonts; fonts are those of the visitor's system."""
    fonts = ("system-ui", "sans-serif")
    return gr.themes.Base(primary_hue="blue", font=fonts, font_mono=("ui-monospace", "monospace"))


class Page:
    """A running page.

    Attributes:
        blocks: its `gradio.Blocks`.
        local_url: its address on this machine.
    """

    def __init__(self, blocks: Any, jobs: Jobs):
        self.blocks, self.jobs, self.local_url = blocks, jobs, str(blocks.local_url)

    def wait(self) -> None:
        """Serve until the page is closed. Raises: KeyboardInterrupt: the process is interrupted."""
        while self.blocks.is_running:
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Cancel all jobs, hang up, and end the threads of the page, as far as they end within `CLOSE_SECONDS`."""
        self.jobs.close(CLOSE_SECONDS)
        server = self.blocks.server
        # Visitors who wait for an answer are not waited for.
        server.config.timeout_graceful_shutdown = HANG_UP_SECONDS
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # It would call them errors.
        self.blocks.close(verbose=False)
        server.thread.join(CLOSE_SECONDS)


def serve(args: AppArguments) -> Page:
    """Start the page in threads of this process.

    Raises:
        ValueError: gradio is not installed, or there is no folder of runs.
        OSError: the port is taken.
    """
    if not Path(args.runs).is_dir():
        raise ValueError(f"--runs {args.runs} is no folder; give one of runs, such as the one that `make demo` fills")
    # Of its own accord, gradio reports usage to its makers.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    kept_folder()
    pass_proxies(args.host)
    gr = import_extra("gradio", "app", "the page")
    middleware = importlib.import_module("starlette.middleware")  # Gradio is built on it.
    blocks, jobs = build_page(gr, args)
    limits = {"max_bytes": args.max_upload_mb * MB + OVERHEAD, "max_waiting": args.queue_size}
    limits["max_kept"] = args.max_kept_mb * MB
    guard = middleware.Middleware(Guard, **limits, hosts=known_hosts(args.host))
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port or None,
            max_file_size=args.max_upload_mb * MB,
            app_kwargs={"middleware": [guard]},
            theme=theme(gr),
            css=CSS,
            share=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"--port {args.port} of --host {args.host} cannot be listened on: {error}") from error
    return Page(blocks, jobs)
