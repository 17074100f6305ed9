"""`torchrun ... -m trainer.train` with the flags of the mini_trainer command line."""

import sys

from trainer.cli.main import report_errors
from trainer.mini_trainer import run

if __name__ == "__main__":
    sys.exit(report_errors(run, sys.argv[1:]))
