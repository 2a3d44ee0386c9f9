"""Language models that map tokens to the logits of the next token."""
