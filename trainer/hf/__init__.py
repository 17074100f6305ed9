"""What users of transformers' Trainer hold: the class with its override points, and what they ask of it."""
