"""What to train on: from a line of JSONL to the micro-batches of every rank. Knows nothing of models, ranks are arguments."""
