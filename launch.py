"""Train a language model with a positional encoding, and measure how it reads past its training length.

    python launch.py --config=configs/rope_extrap.py           train, or continue, or print the table of a finished run
    python launch.py --config=configs/rope_extrap.py:encoding=alibi,size=small      choose another encoding and size
    python launch.py --config=configs/rope_extrap.py --config.training.length=512 --config.encoding.base=500000
    python launch.py --config=... --workdir=DIR                default: runs/NAME-ENCODING-FINGERPRINT
    python launch.py --config=experiments/length_extrapolation.py               run a study, in runs/NAME
    python launch.py --config=... --dry_run                    print the FLOPs and estimated time of a run, or of each
                                                               program of a study
    python launch.py --config=... --shard=2                    train only the runs of the second program of a study
    python launch.py --config=... --stack_runs                 train runs that share a program at the same time;
                                                               this is the default on accelerators
    python launch.py --config=... --submit="timeout_min=240 slurm_partition=gpu gpus_per_node=1"
                                                               submit one SLURM job per program (needs submitit)
    python launch.py --config=... --coordinator=HOST:PORT --processes=4 --process_id=N
                                                               start process N (from 0) of 4. Cloud TPU pods and srun
                                                               are detected; --processes=1 turns detection off

configs/base.py documents every setting. Exit codes: 0 done; 1 a file could not be read or written, for example because
the disk is full; 2 wrong setting or usage; 3 the loss became non-finite; 4 the workdir is in use or belongs to another
run; 5 another process of the run ended or did not start (1 or 134 if jax notices first); 130 and 143 stopped by SIGINT
or SIGTERM, after saving.
"""

import collections
import itertools
import logging
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.data import tokenizer_file
from posenc_jax.distributed import environment, hosts
from posenc_jax.errors import one_line, reason
from posenc_jax.files import in_project
from posenc_jax.runs.grid import Study
from posenc_jax.schema import ConfigError, literal, type_name, unknown_field
from posenc_jax.untrusted import printable

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where results go")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what a run or a study would do")
SHARD = flags.DEFINE_integer("shard", None, "the program of a study whose runs are meant, from 1")
STACK_RUNS = flags.DEFINE_bool("stack_runs", None, "train the runs of each program of a study at once, not in turn")
COORDINATOR = flags.DEFINE_string("coordinator", None, "the host and port of process 0")
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes do the run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which one this is, from 0")
SUBMIT = flags.DEFINE_string("submit", None, "run each program of a study as a job with these settings of submitit")

RENAMED_FLAGS = {"together": "stack_runs", "part": "shard", "process": "process_id"}  # flags of earlier releases
MAX_CHARACTERS = 10_000  # of an error message


class PrintableFormatter(logging.Formatter):
    """Formats log records without terminal control characters, which file names and file contents may have."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def tell_unraisable(raised: "sys.UnraisableHookArgs") -> None:
    """A `sys.unraisablehook` that hides one error: a write that finishes after orbax has aborted a checkpoint."""
    if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(raised)


def main(arguments: list[str]) -> int:
    launched = time.monotonic()
    if {"--help", "-h", "-help"} & set(arguments):
        print(__doc__)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that a study can write its partial results
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    for name in ("absl", "asyncio"):  # orbax and its tasks log stack traces of errors that are raised anyway
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("posenc_jax.evaluation.extrapolation").setLevel(logging.INFO)  # logs long passes
    sys.unraisablehook = tell_unraisable
    try:
        environment.check()  # this and the next line must precede the import of jax, also by config files
        environment.keep_freed_memory()
        asked, workdir = read_flags(arguments)
        place = hosts.place(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
        trains_here = not DRY_RUN.value and (SUBMIT.value is None or SHARD.value is not None)
        if place is not None and trains_here:
            hosts.join(place)
        if DRY_RUN.value:
            from posenc_jax.runs.plan import print_plan

            print_plan(asked)
        elif isinstance(asked, RunConfig):
            from posenc_jax.runs.run import run

            run(asked, workdir, launched=launched)
        elif not trains_here:
            from posenc_jax.runs.cluster import submit

            submit(asked, workdir, str(SUBMIT.value), [sys.executable, __file__, *arguments])
        else:
            from posenc_jax.runs.study import run_study

            run_study(asked, workdir, launched=launched, stack_runs=STACK_RUNS.value, shard=SHARD.value)
    except SystemExit:
        hosts.leave(143, alike=False)
        raise
    except KeyboardInterrupt:
        return _fail(130, "stopped; the same command continues from the last checkpoint")
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is not None:
            return _fail(code, error, alike=code not in (1, hosts.LOST))
        if isinstance(error, OSError):
            return _fail(1, f"{reason(error)}: {error.filename or workdir}")
        raise
    hosts.leave(0, alike=True)
    return 0


def read_flags(arguments: list[str]) -> tuple[RunConfig | Study, Path]:
    """The requested run or study, and its folder. Raises ConfigError."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(arguments)
        _check_given_once(arguments)
        arguments = _find_config_file(arguments)
        _check_tuples(arguments)
        leftover = flags.FLAGS(["launch.py", *arguments])[1:]
        settings = CONFIG.value and CONFIG.value.to_dict()  # runs the config file, if the flags did not
    except Exception as error:  # any kind: config files are programs
        wrong = ConfigError("arguments", " ".join(arguments), one_line(error))
        raise _innermost_config_error(error) or _wrong_override(arguments, error) or wrong from error
    if leftover:
        raise ConfigError("arguments", leftover[0], "is not a flag; write --config.FIELD=VALUE with the dashes and =")
    if settings is None:
        raise ConfigError("--config", None, "must name a file, such as --config=configs/rope_extrap.py")
    if WORKDIR.value is not None and not (WORKDIR.value and WORKDIR.value.isprintable()):
        raise ConfigError("--workdir", WORKDIR.value, "must name a folder, by characters that can be shown")
    if {"base", "sweep"} & settings.keys():
        study = Study.from_mapping(settings | ({"base": _resolved(settings["base"])} if "base" in settings else {}))
        return study, Path(WORKDIR.value or f"runs/{study.name}")
    for flag in (SHARD, STACK_RUNS, SUBMIT):
        if flag.value != flag.default:
            raise ConfigError(f"--{flag.name}", flag.value, "is for studies, which are in experiments/")
    config = RunConfig.from_mapping(tokenizer_file.resolve(_resolved(settings)))
    return config, Path(WORKDIR.value or f"runs/{config.name}-{config.label}-{config.fingerprint}")


def _resolved(settings: Any) -> Any:
    """The settings of a run, with open ones filled in from the model that it starts from. Raises ConfigError."""
    if not isinstance(settings, Mapping) or not settings.get("init_from"):
        return settings
    from posenc_jax.runs.sources import resolve  # imports jax

    return resolve(settings)


def _check_given_once(arguments: list[str]) -> None:
    """Raise ConfigError for repeated flags, including --noFLAG, and for renamed flags and --undefok.

    absl would use only the last value of a repeated flag, and would join tuples.
    """
    named = (re.match(r"--?(?:no)?([A-Za-z][^=]*)", argument) for argument in arguments)
    for name, count in collections.Counter(match[1] for match in named if match).items():
        if count > 1:
            raise ConfigError(f"--{name}", f"given {count} times", "must be given once")
        if name in RENAMED_FLAGS:
            raise ConfigError(f"--{name}", "given", f"this flag is now named --{RENAMED_FLAGS[name]}")
        if name == "undefok":
            raise ConfigError("--undefok", "given", "must be left out: no flag may be unknown")


def _find_config_file(arguments: list[str]) -> list[str]:
    """The arguments, with the path of the config file resolved.

    The file is searched for in the working directory, then in the folder of launch.py.
    """
    found = list(arguments)
    for i, argument in enumerate(arguments):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            text = match[1] if match[1] is not None else next(iter(arguments[i + 1 :]), "")
            name, colon, options = text.partition(":")
            path = in_project(name)
            if name and not path.is_file():
                own = Path(__file__).parent
                known = [
                    f"{folder}/{file.name}"
                    for folder in ("configs", "experiments")
                    for file in own.glob(f"{folder}/*.py")
                ]
                raise ConfigError("--config", name, f"must be a file, seen from here or from {own}", known)
            found[i : i + 1 + (match[1] is None)] = [f"--config={path}{colon}{options}"]
    return found


def _check_tuples(arguments: list[str]) -> None:
    """Raise ConfigError for mappings, sets and bytes. The flags would convert them to tuples."""
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        match = re.fullmatch(r"--?(config[.][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match and isinstance(literal(after if match[2] is None else match[2]), dict | set | bytes):
            raise ConfigError(match[1], match[2] or after, "must be a tuple, such as (32, 64), a number or a text")


def _wrong_override(arguments: list[str], error: Exception) -> ConfigError | None:
    """The unknown field, or the value of the wrong type, in the --config.FIELD=VALUE that caused the error."""
    files = [argument.partition("=")[2] for argument in arguments if re.match("--?config=", argument)]
    given = {argument.lstrip("-"): argument for argument in arguments if re.match("--?(no)?config[.]", argument)}
    if not files or not given:
        return None
    settings = flags.FLAGS["config"].parser.parse(files[0])
    if not isinstance(settings, ConfigDict):  # the config file failed to read another file
        return None
    for text in given:
        path, _, value = text.removeprefix("no").partition("=")
        section, kind = settings, ConfigDict
        for i, name in enumerate(path.split(".")[1:], 2):
            if not isinstance(section, ConfigDict) or name not in section:
                known = section if isinstance(section, ConfigDict) else ()
                return unknown_field(".".join(path.split(".")[:i]), value, known)
            kind, section = section.get_type(name), section[name]
        if f"flag --{text}: " in str(error):
            kind = "a section" if isinstance(section, ConfigDict) else type_name(kind)
            return ConfigError(path, value, f"must be {kind}")
    return None


def _innermost_config_error(error: BaseException | None) -> ConfigError | None:
    """The ConfigError that a config file raised. The flags wrap it in errors of their own."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _fail(code: int, told: object, *, alike: bool = False) -> int:
    """Print why the command fails, and leave. Only process 0 prints if all processes of a run fail `alike`."""
    if not alike or hosts.is_leader():
        print(printable(f"error: {told}")[:MAX_CHARACTERS], file=sys.stderr)
    hosts.leave(code, alike=alike)
    return code


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
