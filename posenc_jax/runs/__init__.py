"""Runs and studies, from settings to report. A single run takes the same way as the runs of a study:

- `run` and `study` take the settings of one run, or of many as `grid` makes them, and own the folders;
- `driver` does what is left of each run: it prepares, trains, evaluates and finishes it;
- `program` groups runs that share compiled code, and stacks them so that one call trains several;
- `train` is the training loop of a stack; a single run is a stack of one;
- `finish` and `study_results` write tables, figures and reports, from the sums of windows alone.
"""
