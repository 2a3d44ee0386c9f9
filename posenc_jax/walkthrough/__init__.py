"""One sentence followed through a transformer's positional encodings, shape by shape: numbers, words and pictures."""
