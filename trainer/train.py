"""`torchrun ... -m trainer.train` with the flags of the mini_trainer command line."""

import sys

from trainer.cli.logs import display_that_may_fail, level_in, logs_on_stderr
from trainer.cli.main import report_errors
from trainer.mini_trainer import run

if __name__ == "__main__":
    with display_that_may_fail(is_result=False), logs_on_stderr(level_in(sys.argv[1:])):
        sys.exit(report_errors(run, sys.argv[1:]))
