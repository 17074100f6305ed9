"""Who is to blame when ranks lose each other: each says in the group's store what stopped it, and the rest draw the
conclusion.

Knows torch's store, which outlives the group's connections; knows nothing of what the ranks were doing. Invariant: it
is used once everything has failed, waits a bounded time, and never hides the error that it explains.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

SECONDS_TO_SPEAK = 5.0  # a rank that lives says within this time what stopped it
_LOST = "lost"
_SIGNS = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "connectfullmesh")


def is_loss_of_peer(error: BaseException) -> bool:
    """Return whether an error means that another rank does not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def announce(error: BaseException, where: str, rank: int, run: int) -> None:
    """Say what stopped this rank."""
    said = _LOST if is_loss_of_peer(error) else f"{where}: {type(error).__name__}: {error}"

    def write() -> str:
        try:
            _store().set(_key(rank, run), said)
        except (RuntimeError, dist.DistError):  # the process that kept the store is gone
            return ""
        return ""

    _within_deadline(write, "")


def name_failed_rank(rank: int, world_size: int, run: int) -> str:
    """Say which rank failed, from what the others announce in time.

    Ends even if the host of the store is frozen or cannot be reached: then it says so.
    """
    unreachable = (
        f"the host of the ranks' store did not answer within {2 * SECONDS_TO_SPEAK:.0f} s: another node is down or "
        "frozen, or the network to it is"
    )
    return _within_deadline(lambda: _read_announcements(rank, world_size, run), unreachable)


def _read_announcements(rank: int, world_size: int, run: int) -> str:
    others = [other for other in range(world_size) if other != rank]
    said: dict[int, str] = {}
    deadline = time.monotonic() + SECONDS_TO_SPEAK
    try:
        store = _store()
        while len(said) < len(others) and time.monotonic() < deadline:
            for other in others:
                if other not in said and store.check([_key(other, run)]):
                    said[other] = store.get(_key(other, run)).decode(errors="replace")
            if any(text != _LOST for text in said.values()):
                break
            time.sleep(0.05)
    except (RuntimeError, dist.DistError):
        return "another rank died, and with it what the ranks keep in common; its own message is above, if it had one"
    failed = [f"rank {other} failed at {text}" for other, text in sorted(said.items()) if text != _LOST]
    silent = [str(other) for other in others if other not in said]
    if failed:
        return "; ".join(failed)
    if silent:
        return f"rank {', '.join(silent)} died or hangs: it did not answer within {SECONDS_TO_SPEAK:.0f} s"
    return "the ranks lost each other, though all of them live: look at the network"


def _within_deadline(act: Callable[[], str], otherwise: str) -> str:
    """Return what `act` returns, or `otherwise` if it takes twice the time that a rank has to speak.

    On a thread of its own: a call on a TCPStore whose host is frozen or unreachable can block beyond the timeout of the
    store, and nothing in the calling thread could end it.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(act()), name="trainer-store", daemon=True).start()
    try:
        return answers.get(timeout=2 * SECONDS_TO_SPEAK)
    except queue.Empty:
        return otherwise


def _store() -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=SECONDS_TO_SPEAK))
    return store


def _key(rank: int, run: int) -> str:
    return f"trainer/stopped/{run}/{rank}"
