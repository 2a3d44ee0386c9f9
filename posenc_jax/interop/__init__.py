"""Models of other projects: read and write their weights, settings and tokenizers."""
