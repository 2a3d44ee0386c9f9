"""Runs and studies, from settings to report. A single run and the runs of a study share one path:

- `run` and `study` are the entry points; `grid` makes the run specifications of a study;
- `sources` opens the model that a run starts from, and fills in the settings that it decides;
- `driver` prepares each run, locks its workdir, trains, evaluates and finishes it;
- `program` groups runs that share compiled code, and stacks them so that one call trains several;
- `train` is the training loop of a stack; a single run is a stack of one;
- `finish` and `study` write results, figures and reports, whose measurements come from the sums over windows.
"""
