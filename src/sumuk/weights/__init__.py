"""Floor 3: checkpoints. What a file is, loading it as a model, saving a model."""
