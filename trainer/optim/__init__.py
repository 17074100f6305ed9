"""How the model moves: optimizers, learning-rate schedules, gradient norm and clipping."""
