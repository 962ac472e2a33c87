"""A W&B server that refuses, hangs or answers 500: the run ends as usual and its record is complete."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import loggers, main
from lightning_prune.cli.loggers import TrackedRun
from lightning_prune.cli.run_folder import RunSettings

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dense_dit.yaml"


class _Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """A server of that kind of trouble; its address."""
    if kind == "refusing":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    elif kind == "hanging":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    else:
        server: HTTPServer = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def records(run: Path) -> list[dict[str, Any]]:
    (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    program = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [program, "leet", "inspect", "--json", str(record)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(loggers, "_ANSWER_WITHIN", 0.5)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("kind", ["refusing", "hanging", "broken"])
def test_a_silent_server_makes_the_run_an_offline_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with pytest.warns(UserWarning, match="recorded offline"):
            logger = TrackedRun(RunSettings(wandb="online"), tmp_path / "x")
        assert logger._offline


@pytest.mark.usefixtures("online")
@pytest.mark.filterwarnings("ignore:.*recorded offline")
def test_a_run_against_a_broken_server_ends_with_a_complete_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint("broken") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tags = ["--run.wandb", "online", "--run.group", "g", "--run.tags", "[a, b]"]
        assert main(["fit", "--config", str(SMOKE), "--run.root", str(tmp_path), "--run.name", "x", *tags]) == 0
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = records(tmp_path / "x")
    text = json.dumps(found)
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]
    history = [r["history"].get("item", r["history"]) for r in found if r["type"] == "history"]
    assert sorted(item["trainer/global_step"] for item in history if "loss" in item) == [0, 1]
    (run,) = [r["run"] for r in found if r["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["tags"]) == ("g", "fit", ["a", "b"])
    assert "report._type" in text
    assert '"pruning.json"' in text, "the manifest, as an artifact"


def test_a_healthy_server_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Healthy(_Broken):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    assert not TrackedRun(RunSettings(wandb="online"), tmp_path / "x")._offline
    server.server_close()
