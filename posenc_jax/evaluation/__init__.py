"""What a trained model is worth at each length, on the same tokens for every model."""
