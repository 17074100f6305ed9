"""Ends a rank whose launcher is gone: nobody would end it when another rank fails, nor start it anew.

Loads no torch, so that it watches while torch is imported. Invariant: a rank that torchrun started ends within
`SECONDS_TO_LOOK` and `SECONDS_TO_SAVE` of its launcher, however that one was killed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping

SECONDS_TO_LOOK = 0.5
SECONDS_TO_SAVE = 3.0  # a step that ends by then is saved

logger = logging.getLogger(__name__)
_watching: list[int] = []  # processes that watch: a fork has no threads of its parent


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Watch, on a thread, the process of torchrun that started this rank, and end the rank soon after it.

    Not PR_SET_PDEATHSIG, which Linux sends when the thread that started this process ends, of a launcher that lives.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or os.getpid() in _watching:
        return
    _watching.append(os.getpid())
    threading.Thread(target=_watch, args=(os.getppid(),), name="trainer-launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS_TO_LOOK)
    try:
        logger.warning("the launcher of this rank (pid %d) is gone: saving if there is time, and ending", launcher)
    finally:
        # The kernel ends the process by SIGALRM, also while Python ends and no thread of it runs any more. Where
        # somebody handles that signal, this thread does it.
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_SAVE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_SAVE + SECONDS_TO_LOOK)
        os.kill(os.getpid(), signal.SIGKILL)
