"""Two nodes: two torchrun agents of one process each, which meet on this machine."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.test_faults import LONG, finish, read_until
from tests.workplace import Workplace, environment

pytestmark = pytest.mark.slow
NODES = (
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"),
    *("trainer.precision=32-true", "moe.refined.steps=0"),  # local steps would make much of the last digits
)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def agent(workplace: Workplace, name: str, port: int, *overrides: str) -> "subprocess.Popen[str]":
    """One node's torchrun, and the process that it starts; a session of their own, to be killed together."""
    meeting = ("--rdzv-id=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting, "-m"]
    return subprocess.Popen(
        [*torchrun, *workplace.command(name, *NODES, *overrides)[2:]],
        cwd=workplace.root,
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_the_meeting(port: int) -> None:
    """Until an agent listens there."""
    until = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until, "nobody listens after two minutes"
        time.sleep(0.1)


def wait_for_a_checkpoint(store: Path) -> None:
    """Of the stage under way."""
    until = time.monotonic() + 120
    while not list(store.rglob("step=*.ckpt")):
        assert time.monotonic() < until, "no checkpoint after two minutes"
        time.sleep(0.1)


def weights(workplace: Workplace, name: str) -> dict[str, torch.Tensor]:
    """Of an export."""
    return load_file(workplace.root / name / "checkpoint" / "model.safetensors")


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """To what sums in another order leave."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=2e-3, atol=2e-4, msg=name)


def test_two_nodes_end_with_the_weights_of_one_process(workplace: Workplace, tmp_path: Path) -> None:
    finish(workplace.start("alone", f"store={tmp_path / 'alone'}", "moe.refined.steps=0"))
    port, store = free_port(), f"store={tmp_path / 'shared'}"
    first, second = (agent(workplace, "nodes", port, store) for _ in range(2))
    finish(first)
    finish(second)
    assert_close(weights(workplace, "alone"), weights(workplace, "nodes"))


def test_a_node_that_is_killed_ends_the_other_and_the_same_command_goes_on(
    workplace: Workplace, tmp_path: Path
) -> None:
    store = f"store={tmp_path / 'store'}"
    finish(workplace.start("undisturbed", f"store={tmp_path / 'alone'}", "moe.refined.steps=0", *LONG))
    port = free_port()
    first = agent(workplace, "killed", port, store, *LONG)
    wait_for_the_meeting(port)  # so that the agents meet at the first, which is not the one that is killed
    second = agent(workplace, "killed", port, store, *LONG)
    read_until(first, "retrain: retrained .*: computing")
    wait_for_a_checkpoint(tmp_path / "store")
    node = psutil.Process(second.pid)
    for process in [node, *node.children(recursive=True)]:  # what an agent starts has a session of its own
        process.kill()
    output, _ = first.communicate(timeout=120)
    assert first.returncode != 0
    assert re.search(r"error: .*another process of this run has ended", output)
    port = free_port()
    first, second = (agent(workplace, "killed", port, store, *LONG) for _ in range(2))
    output = finish(first) + finish(second)
    assert "retrain: going on from" in output
    assert_close(weights(workplace, "undisturbed"), weights(workplace, "killed"))
