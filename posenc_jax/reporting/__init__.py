"""Output of runs and studies, from their results alone: tables, figures, report.md, TensorBoard and the terminal."""
