"""Orthogonal subspace fine-tuning: matrices of which only the directions of small singular values train."""
