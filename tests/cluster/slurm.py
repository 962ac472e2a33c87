"""A SLURM of one controller and two nodes on this machine: no systemd, no database, no cgroups."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
SCHEDULING = {"PENDING", "CONFIGURING", "COMPLETING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=1
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=16 RealMemory=4000 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=16 RealMemory=4000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# A pretended GPU: a character device that every machine has, so that the scripts run unchanged.
_GRES = "NodeName=node[1-2] Name=gpu File=/dev/null\n"

# MASTER_ADDR stands in for a name service that knows node1; everything else of the project's scripts is as it ships.
_ENV = """\
LIGHTNING_PRUNE=({python} -m lightning_prune)
export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
export PYTHONPATH={root} PYTHONFAULTHANDLER=1
"""


def missing() -> str | None:
    """Why there can be no SLURM here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else None


@dataclass(frozen=True)
class Cluster:
    """A running SLURM. Jobs run in `folder`/jobs, which is where they write too."""

    folder: Path
    environment: Mapping[str, str]

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    def call(self, *command: str | Path) -> str:
        """Run a program of SLURM's in the folder of jobs; its output."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=self.environment, cwd=self.jobs,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """The id of a job that `sbatch` made."""
        return self.call("sbatch", "--parsable", *arguments).strip()

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, *jobs: str, timeout: float = 900) -> list[str]:
        """Wait until jobs are over; their states."""
        states = {}

        def over() -> bool:
            states.update({job: self.fields(job)["JobState"] for job in jobs})
            return not SCHEDULING & set(states.values())

        wait(over, timeout, lambda: f"{states}\n{self.output()}")
        return [states[job] for job in jobs]

    def output(self) -> str:
        """What jobs printed, for messages."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.jobs.glob("*.out")))


def wait(until: Callable[[], bool], timeout: float, what: Callable[[], str]) -> None:
    """Ask twice a second; an assertion with `what()` after `timeout` seconds."""
    for _ in range(int(2 * timeout)):
        if until():
            return
        time.sleep(0.5)
    raise AssertionError(f"waited {timeout} s for: {what()}")


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start a cluster whose state, logs and sockets are in `folder`, and stop it at the end."""
    for name in ("munge", "state", "jobs", "spool-node1", "spool-node2"):
        (folder / name).mkdir(parents=True)
    environment = _settings(folder)
    cluster = Cluster(folder, environment)
    try:
        _start(cluster)
        yield cluster
        _cancel(cluster)
    finally:
        _stop(folder)


def _settings(folder: Path) -> dict[str, str]:
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    user, (controller, first, second) = subprocess.getoutput("id -un"), _free_ports(3)
    conf = _CONF.format(
        folder=folder, user=user, host=socket.gethostname(), controller=controller, first=first, second=second
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(_GRES)
    (folder / "env.sh").write_text(_ENV.format(python=sys.executable, root=ROOT))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "WANDB_", "PYTEST_"))}
    return {
        **inherited,
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "LIGHTNING_PRUNE_ENV": str(folder / "env.sh"),
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _start(cluster: Cluster) -> None:
    folder, conf = cluster.folder, str(cluster.folder / "slurm.conf")
    munge = folder / "munge"
    files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
    cluster.call("munged", "--force", f"--socket={munge / 'socket'}", *files)
    cluster.call("slurmctld", "-c", "-f", conf)
    for node in ("node1", "node2"):
        cluster.call("slurmd", "-N", node, "-f", conf)
    wait(lambda: _idle(cluster) == 2, 60, lambda: cluster.call("sinfo", "-N") + _logs(folder))


def _idle(cluster: Cluster) -> int:
    try:
        return cluster.call("sinfo", "-h", "-N", "-o", "%t").split().count("idle")
    except AssertionError:  # the controller is not up yet
        return 0


def _logs(folder: Path) -> str:
    return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in folder.glob("*.log"))


def _cancel(cluster: Cluster) -> None:
    """End what a failed test left running: a node's daemon that stops leaves its jobs alone."""
    cluster.call("scancel", "--state=PENDING")
    cluster.call("scancel", "--state=RUNNING")
    wait(lambda: not cluster.call("squeue", "-h"), 60, lambda: cluster.call("squeue"))


def _stop(folder: Path) -> None:
    """End the daemons by their pid files, those that start jobs first."""
    for file in [*folder.glob("slurmd-*.pid"), folder / "slurmctld.pid", folder / "munge" / "pid"]:
        if file.exists() and (pid := file.read_text().strip()):
            _kill(int(pid))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 15)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, 9)
    except ProcessLookupError:
        return
