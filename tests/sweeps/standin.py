"""As much of a W&B server as `wandb sweep` and `wandb agent` talk to: it accepts a sweep and hands out its grid."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

PROJECT = {"id": "p", "name": "lightning_prune", "entity": {"id": "e", "name": "someone"}}


def grid(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination, names sorted, the last fastest."""
    names = sorted(parameters)
    choices = [parameters[name].get("values", [parameters[name].get("value")]) for name in names]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


class Server:
    """State of the stand-in: the sweep it was given, and the trials it gave out."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        self.given: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, str]] = []
        self.operations: list[str] = []

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL answer."""
        self.operations.append(re.sub(r"\s+", " ", query).strip()[:60])
        if "upsertSweep" in query:
            self.config = yaml.safe_load(variables["config"])
            self.waiting = grid(self.config["parameters"])
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": PROJECT}, "configValidationWarnings": []}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if "agentHeartbeat" in query:
            self.states.append(json.loads(variables["runState"]))
            commands = json.dumps(self._commands(bool(self.states[-1])))
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": commands}}
        if "sweepName" in query or "sweep(" in query:
            return {"project": {**PROJECT, "sweep": self._sweep()}}
        if "viewer" in query:
            user = {"id": "u", "username": "someone", "entity": "someone", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": user, "serverInfo": {"cliVersionInfo": {"max_cli_version": "1.0.0"}}}
        return {}

    def _sweep(self) -> dict[str, Any]:
        names = ("description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler")
        return dict.fromkeys(names) | {
            "id": "s", "name": "sweep1", "method": "grid", "state": "RUNNING", "config": yaml.safe_dump(self.config),
            "earlyStopJobRunning": False, "runs": {"edges": []},
        }  # fmt: skip

    def _commands(self, busy: bool) -> list[dict[str, Any]]:
        if busy:
            return []
        if not self.waiting:
            return [{"type": "exit"}]
        run, trial = f"trial{len(self.given)}", self.waiting.pop(0)
        self.given[run] = trial
        args = {name: {"value": value} for name, value in trial.items()}
        return [{"type": "run", "run_id": run, "program": None, "args": args}]


@contextmanager
def serving() -> Iterator[tuple[Server, str]]:
    """A stand-in and its address."""
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            try:
                call = json.loads(body)
            except ValueError:
                call = {}
            with lock:  # agents ask side by side
                answer = state.answer(call.get("query", ""), call.get("variables") or {})
            self._send({"data": answer})

        def _send(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
