"""Runs on two hosts: network namespaces with a cable between them, which is pulled; a host that dies and comes back."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers.trainer_callback import TrainerCallback

from tests.fixtures.killed import check_as_if_never_killed, check_what_is_there, job
from tests.fixtures.models import tiny_llama
from tests.fixtures.nodes import ADDRESSES, CARD, Nodes, two_nodes
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.runs import build_arguments, build_store, random_token_samples
from trainer import Trainer
from trainer.errors import RankError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # of the lane nodes2
PATIENCE = 12  # seconds until a collective gives up: longer than the cable is out
SECONDS_OUT = 8.0
SECONDS_TO_SPEAK = 2.0
SECONDS_TO_END = 60  # after a cable was pulled for good, on a busy machine; idle 12 and 4
STEP_OUT, STEP_CUT = 3, 8  # the cable is out for a while; for good
KILLED_AT = 9


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


class PullsTheCable(TrainerCallback):
    """Takes the cable out for some seconds at one step, and for good at a later one."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        if state.is_world_process_zero and state.global_step + 1 in (STEP_OUT, STEP_CUT):
            self.nodes.pull_cable()
            if state.global_step + 1 == STEP_OUT:
                threading.Timer(SECONDS_OUT, self.nodes.pull_cable, kwargs={"is_in": True}).start()


class Dies(TrainerCallback):
    """Kills the second host once: its rank, and the agent that would start it anew."""

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        died = Path(args.output_dir, "died")
        if state.global_step + 1 == KILLED_AT and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def refused(folder: Path, samples: list[Any]) -> str:
    args = build_arguments(folder, use_cpu=True, max_steps=1, save_strategy="steps")
    with pytest.raises(UsageError) as caught:
        Trainer(tiny_llama(), args, train_dataset=build_store(samples)).train()
    return str(caught.value)


def run_on_node(nodes: Nodes, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Refuse what nodes must share and do not; then train."""
    rank = int(os.environ["RANK"])
    nodes.enter(rank)
    samples = random_token_samples([5, 6, 7, 8 + rank])  # one node has another copy
    said = [refused(folder / "stale", samples), refused(folder / f"unshared_{rank}", samples[:2])]
    return said, job(folder / "killed", {"ddp_timeout": PATIENCE})


def test_two_nodes_do_the_run_of_two_ranks(launch: Launch, nodes: Nodes, tmp_path: Path) -> None:
    ended = launch(2, run_on_node, nodes, tmp_path, group=False, nodes=2, env=nodes.environment()).values
    for said, _ in ended:
        assert "rank 1 differs from rank 0 in train_dataset: 4 samples, digest" in said[0]
        assert "look for an old copy on one of the nodes" in said[0]
        assert "is not the folder that rank 0 writes to: checkpoints need one that all ranks share" in said[1]
    check_as_if_never_killed(launch, tmp_path, 2, ended[0][1])


def run_and_pull(nodes: Nodes, folder: Path) -> None:
    nodes.enter(int(os.environ["RANK"]))
    options = {"ddp_timeout": PATIENCE, "seconds_to_speak": SECONDS_TO_SPEAK, "async_save": False}
    job(folder, options, [PullsTheCable(nodes)])


def agent_of_node(nodes: Nodes, folder: Path) -> dict[str, torch.Tensor]:
    """Run torchrun's agent of this host until the run is done, and start it anew where it is killed."""
    node = int(os.environ["RANK"])
    nodes.enter(node)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    dynamic_rendezvous.get_method_name = lambda depth=2: ""  # searches the sources of all that is imported here
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{ADDRESSES[0]}:29400",
        rdzv_configs={"is_host": node == 0, "keep_alive_interval": 1, "keep_alive_max_attempt": 3},
        local_addr=ADDRESSES[node],
        run_id="run",
        max_restarts=5,
        monitor_interval=0.1,
        start_method="fork",
    )
    agent = os.fork()
    if agent == 0:
        (weights,) = elastic_launch(config, rank_of_node)(folder).values()
        torch.save(weights, folder / f"weights_{node}.pt")
        os._exit(0)
    _, status = os.waitpid(agent, 0)
    if os.WIFSIGNALED(status):
        return agent_of_node(nodes, folder)
    assert status == 0
    return torch.load(folder / f"weights_{node}.pt", weights_only=True)


def rank_of_node(folder: Path) -> dict[str, torch.Tensor]:
    options = {"ddp_timeout": PATIENCE, "seconds_to_speak": SECONDS_TO_SPEAK, "async_save": False}
    return job(folder, options, [Dies()])


def test_a_cable_out_for_a_while_is_waited_for_one_that_is_cut_is_named_and_a_killed_node_goes_on(
    launch: Launch, nodes: Nodes, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    started = time.monotonic()
    cut = launch(2, run_and_pull, nodes, folder, group=False, nodes=2, env=nodes.environment(), timeout=120)
    assert time.monotonic() - started < SECONDS_OUT + PATIENCE + SECONDS_TO_END
    nodes.pull_cable(is_in=True)
    for outcome in cut:
        assert isinstance(outcome.error, RankError), cut.report()
    assert f"step {STEP_CUT}: rank 1 died or hangs: it did not answer within" in str(cut[0].error)
    assert f"step {STEP_CUT}: the host of the ranks' store did not answer within" in str(cut[1].error)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEP_CUT))
    assert lines[STEP_OUT - 1]["step_seconds"] > SECONDS_OUT / 2
    check_what_is_there(folder)
    # What they had is gone on with, by torchrun's agents, one of which is killed with its rank.
    environment = {"GLOO_SOCKET_IFNAME": CARD, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = launch(2, agent_of_node, nodes, folder, group=False, nodes=2, env=environment, timeout=200).values
    assert (folder / "died").exists()
    check_as_if_never_killed(launch, tmp_path, 2, ended[0])
