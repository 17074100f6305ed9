"""How a run survives: what a checkpoint holds, how it is written, checked, found and read again."""
