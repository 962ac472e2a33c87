"""What a W&B server in trouble costs a run that was asked to record online: interleaved pairs with an offline one.

    python benchmarks/wandb_unreachable.py
    python benchmarks/wandb_unreachable.py --kinds dying --steps 400 --limit 1200

Troubles: nobody listens ("refusing"), connections are taken and never answered ("hanging"), every answer is 500
("broken"), all is well until a run is opened ("stalling"), and until one was ("dying"). Seconds are of the whole
command. The last line is JSON; `ratio` is by trouble the median over pairs of its seconds over the offline run's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = ("refusing", "hanging", "broken", "stalling", "dying")
_USER = {"id": "u", "username": "someone", "entity": "someone", "flags": "{}", "teams": {"edges": []}}
_PROJECT = {"id": "p", "name": "lightning_prune", "entity": {"id": "e", "name": "someone"}}


@contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """A server of that kind of trouble; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if kind == "hanging":
            yield address
            return
    if kind == "refusing":
        yield address
        return
    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Troubled,), {"kind": kind, "over": over}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


class _Troubled(BaseHTTPRequestHandler):
    """Answers what opens a run, if it is "dying"; hangs afterwards, until all is over."""

    kind: str
    over: threading.Event
    opened = False

    def do_GET(self) -> None:
        if self.kind == "broken":
            self.send_error(500)
        elif type(self).opened:
            self.over.wait()
        else:
            self._send({})

    def do_POST(self) -> None:
        if self.kind == "broken":
            self.send_error(500)
        elif self.kind == "stalling" or type(self).opened:
            self.over.wait()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            self._send({"data": self._answer(body.decode(errors="replace"))})

    def _answer(self, query: str) -> dict[str, Any]:
        if "upsertBucket" in query:
            type(self).opened = True
            bucket = {
                "id": "b",
                "name": "r",
                "displayName": "r",
                "config": "{}",
                "sweepName": None,
                "project": _PROJECT,
            }
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        return {"viewer": _USER, "serverInfo": {"cliVersionInfo": {"max_cli_version": "1.0.0"}}}

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def run_seconds(folder: Path, kind: str, steps: int) -> float:
    """Seconds that a training takes, from the command to its end."""
    command = [
        *(sys.executable, "-m", "lightning_prune", "fit", "--config", str(ROOT / "configs/smoke/dense_dit.yaml")),
        *("--run.root", str(folder), "--run.name", kind, "--run.wandb", "offline" if kind == "offline" else "online"),
        *("--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false", "--trainer.callbacks", "[]"),
        *("--trainer.limit_val_batches", "0"),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with endpoint("refusing" if kind == "offline" else kind) as url:
        environment = {**kept, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=float, default=280, help="seconds after which no further round is begun")
    options = parser.parse_args()
    arms, start = ("offline", *options.kinds), time.perf_counter()
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    round_seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        while not seconds["offline"] or time.perf_counter() - start + round_seconds < options.limit:
            begun = time.perf_counter()
            for arm in arms:
                seconds[arm].append(run_seconds(Path(folder), arm, options.steps))
            round_seconds = time.perf_counter() - begun
            print({arm: round(values[-1], 1) for arm, values in seconds.items()}, flush=True)
    pairs = {arm: [a / b for a, b in zip(seconds[arm], seconds["offline"], strict=True)] for arm in options.kinds}
    result = {
        "ratio": {arm: statistics.median(values) for arm, values in pairs.items()},
        "ratios": pairs,
        "seconds": seconds,
        "steps": options.steps,
        "load": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
