"""Who trains: ranks, their process group, every collective, and torchrun from Python."""
