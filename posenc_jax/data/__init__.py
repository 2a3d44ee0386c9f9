"""From text to batches: corpora are split by document, tokenised once into a cache, and cut into windows."""
