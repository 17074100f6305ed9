"""What to train on: from a line of JSONL to the micro-batches of every rank. Knows no models; ranks are arguments."""
