"""Text to batches: corpora, tokenizers, token files and the pipeline that reads them."""
