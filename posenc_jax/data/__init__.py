"""From text to batches: split corpora by document, tokenize them once into a cache, and cut them into windows."""
