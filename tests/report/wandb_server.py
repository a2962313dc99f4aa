"""A simulated server of Weights & Biases, as far as its own client needs one to send a run and to take it up again."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Holds runs: id -> lines of history. A context manager; `url` is where it listens."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.states: list[tuple[str, int]] = []
        """How each start of a run ended: (id, exit code)."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_PUT(self) -> None:  # files of a run: taken and forgotten
                self._body()
                self._answer({})

            def do_POST(self) -> None:
                body = json.loads(self._body() or b"{}")
                if "/file_stream" in self.path:
                    server._stream(self.path.split("/")[-2], body)
                    self._answer({})
                else:
                    self._answer({"data": server._asked(str(body.get("query")), body.get("variables") or {})})

            def _body(self) -> bytes:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

            def _answer(self, data: Any) -> None:
                body = json.dumps(data).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _stream(self, run: str, body: dict[str, Any]) -> None:
        """Lines of history, put where they say they belong."""
        lines = self.history[run]
        sent = body.get("files", {}).get("wandb-history.jsonl")
        if sent is not None:
            lines[sent["offset"] :] = [json.loads(line) for line in sent["content"]]
        if body.get("complete"):
            self.states.append((run, body["exitcode"]))

    def _asked(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "query RunResumeStatus" in query:
            return {"model": self._resumable(given["name"])}
        if "mutation UpsertBucket" in query:
            self.history.setdefault(given["name"], [])
            project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": given["name"], "name": given["name"], "displayName": "tiny", "config": "{}",
                      "historyLineCount": 0, "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history[given["name"]]}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _resumable(self, run: str) -> dict[str, Any] | None:
        if run not in self.history:
            return None
        lines = self.history[run]
        bucket = {"id": run, "name": run, "displayName": "tiny", "summaryMetrics": "{}", "config": "{}", "tags": [],
                  "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0, "eventsTail": "[]",
                  "historyTail": json.dumps([json.dumps(lines[-1])] if lines else []),
                  "wandbConfig": '{"t": 1}'}  # fmt: skip
        return {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}, "bucket": bucket}
