"""What a run shows of itself, from its results alone: tables, figures, report.md, TensorBoard and the terminal."""
