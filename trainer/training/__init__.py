"""The loop: build, step, evaluate, report, save, stop."""
