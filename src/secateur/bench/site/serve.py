"""Serves the leaderboard on this machine, and builds it anew when records change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

from secateur.bench.site.build import build_site
from secateur.bench.store import Store
from secateur.errors import SecateurError

SECONDS = 2.0
"""Between two looks at the records."""


class Site:
    """The built pages, kept up to date while they are served.

    Each build has a stamp of its own, which stands in its pages too: an open page that has another one is out of date.

    Args:
        store: The records.
        out: Folder of the pages.
        on_build: Called with the number of records after each build.
        on_problem: Called with what went wrong when the pages could not be built anew; the next look tries again.
    """

    def __init__(
        self, store: Store, out: Path, on_build: Callable[[int], None], on_problem: Callable[[str], None]
    ) -> None:
        self.store, self.out, self.on_build, self.on_problem = store, out, on_build, on_problem
        self.stamp = ""
        self._seen: object = None
        self._stop = threading.Event()

    def refresh(self) -> bool:
        """Build the pages if records were added, replaced or removed since the last look; return whether."""
        files = dict(self._files())
        if files == self._seen:
            return False
        stamp = uuid4().hex
        boards = build_site(self.store, self.out, stamp)
        self._seen, self.stamp = files, stamp
        self.on_build(sum(len(board.records) for board in boards))
        return True

    def serve(self, port: int, on_address: Callable[[str], None]) -> None:
        """Serve what `refresh` built, and build it anew, on 127.0.0.1 until `stop` or an interrupt; port 0: a free one.

        Raises:
            OSError: The port is taken.
        """
        with ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, site=self, directory=str(self.out))) as server:
            on_address(f"http://127.0.0.1:{server.server_address[1]}/")
            threading.Thread(target=self._watch, args=(server,), daemon=True).start()
            try:
                server.serve_forever(poll_interval=0.2)
            finally:
                self._stop.set()

    def stop(self) -> None:
        """End `serve`."""
        self._stop.set()

    def _files(self) -> Iterator[tuple[Path, int]]:
        """Return the files of records and when each was written; half-written ones start with a dot."""
        for path in self.store.folder.rglob("*.json"):
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # deleted since it was listed
                    yield path, path.stat().st_mtime_ns

    def _watch(self, server: ThreadingHTTPServer) -> None:
        problem = ""
        try:
            while not self._stop.wait(SECONDS):
                try:
                    self.refresh()
                    problem = ""
                except Exception as error:  # a thread that ended would leave the pages as they are, and nobody knew
                    words = str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
                    if words != problem:  # one that lasts is told once
                        problem = words
                        self.on_problem(problem)
        finally:
            server.shutdown()


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, and at /built the stamp of the last build, so that open pages know when to reload."""

    def __init__(self, *args: Any, site: Site, **kwargs: Any) -> None:
        self.site = site
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if self.path != "/built":
            return super().do_GET()
        body = self.site.stamp.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Say that nothing may be kept: the pages change."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""
