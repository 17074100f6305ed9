"""What is trained: transformers models made ready for packed, sharded, exact training, and their export."""
