"""Records on disk: written from photos and portraits, opened without TensorFlow, fed by Grain."""
