"""`python -m trainer` is the command `trainer`."""

import sys

from trainer.cli.main import main

sys.exit(main())
