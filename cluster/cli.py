"""Parses the command line; `preceptor --help` shows every command. An error is one sentence; --debug its trace."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import load_run_config
from cluster.contracts.errors import ConfigError, PreceptorError, RunStopped, in_one_line
from cluster.nodes.preloaded_python import preloading

DASHED_OVERRIDE = re.compile(r"--\w+\.[\w.]+=")  # as other programs have it
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    options = make_parser().parse_args(arguments)
    with suppress(FileNotFoundError):  # the current folder was removed
        # A console script, unlike `python -m`, does not look there for what a run file names by its import path. At the
        # end it shadows nothing; Ray passes the folder on to the workers.
        if (folder := str(Path.cwd())) not in sys.path:
            sys.path.append(folder)
    command: Callable[[argparse.Namespace], int] = options.command
    return report_errors(lambda: command(options), options.debug)


def report_errors(command: Callable[[], int], debug: bool) -> int:
    """Run a command; say in one line what ended it, with `debug` by Python's trace, and return its exit code."""
    try:
        return command()
    except RunStopped as stopped:
        sys.stderr.write(f"preceptor: {stopped}\n")
        return INTERRUPTED
    except PreceptorError as error:
        if debug:
            raise
        sys.stderr.write(f"preceptor: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("preceptor: interrupted; the last complete checkpoint stays\n")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        cause = getattr(error, "cause", None) or error  # of Ray's error, whose own text is a trace
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        sentence = f"{type(cause).__name__}: {in_one_line(str(cause))}".rstrip(": ") + notes
        sys.stderr.write(f"preceptor: unexpected {sentence}; this is a fault of the program; --debug shows its trace\n")
        return 1


def train(options: argparse.Namespace) -> int:
    """Train, from the start or from a run's last checkpoint."""
    if options.resume is None:
        config = _load(options)
        with preloading(config):
            from cluster.commands import start_training

            start_training(config)
        return 0
    run_file, overrides = _split(options.arguments)
    if run_file is not None:
        raise ConfigError(f"--resume takes the run's own configuration; remove {run_file}")
    directory = RunDirectory.open(options.resume)
    config = directory.read_config(overrides)
    with preloading(config):
        from cluster.commands import resume_training

        resume_training(directory, config)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Measure the student, and the teachers if the run file says so, on the held-out prompts."""
    config = _load(options)
    with preloading(config):
        from cluster.commands import evaluate_models

        evaluate_models(config)
    return 0


def check(options: argparse.Namespace) -> int:
    """Print the placement and run the start-up self-checks."""
    config = _load(options)
    with preloading(config):
        from cluster.commands import check_run

        return 0 if check_run(config) else 1


def scale(options: argparse.Namespace) -> int:
    """Change how many workers the pools of a running run have."""
    from cluster.elastic.control_files import open_going_run
    from cluster.elastic.scale import ask, parse_sizes
    from cluster.elastic.splits import describe_sizes

    sizes = parse_sizes(options.sizes)
    answer = ask(open_going_run(options.run).scaling, sizes)
    sys.stdout.write(f"{describe_sizes(answer.sizes)}\n")
    return 0


def teacher(options: argparse.Namespace) -> int:
    """Replace a teacher of a running run by another checkpoint."""
    from cluster.elastic.control_files import open_going_run
    from cluster.elastic.replace_teacher import ask_to_replace

    directory = open_going_run(options.run)
    # The driver's current folder may be another one.
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    sys.stdout.write(f"{ask_to_replace(directory.replacing, options.name, model)}\n")
    return 0


def status(options: argparse.Namespace) -> int:
    """Say how a run stands, while it lives or after."""
    if options.watch:
        if options.json:
            raise ConfigError("--watch shows the run until it ends, --json prints it once; give one of them")
        from cluster.monitoring.watch import watch_status

        with suppress(KeyboardInterrupt):  # it is how one leaves
            watch_status(options.run)
        return 0
    from cluster.monitoring.status import print_status

    print_status(options.run, options.json)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write one HTML file that shows runs: curves, tokens, answers, advice; while they go on or after."""
    from cluster.report.report import write_report

    out = write_report(options.runs, options.out)
    sys.stdout.write(f"{out} ({out.stat().st_size / 1e6:.1f} MB)\n")
    return 0


def rows(options: argparse.Namespace) -> int:
    """List the rows that a run recorded or kept, all or those for which a condition holds."""
    from cluster.run.rows import RowOptions, print_rows

    if options.limit < 0:
        raise ConfigError(f"--limit {options.limit}: expected how many rows to list at most, 0 or more")
    print_rows(options.run, RowOptions(options.where, options.columns, options.limit, options.json, options.text))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Put runs side by side: settings that differ, and what came of them."""
    from cluster.monitoring.compare import print_comparison

    print_comparison(options.runs, options.json)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Prove from a run's ledger that every trajectory was learned from exactly once."""
    from cluster.run.ledger import verify_run

    sys.stdout.write(f"{verify_run(RunDirectory.open(options.run))}\n")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the student of a run's checkpoint as a Hugging Face directory, without engines."""
    from cluster.run.export import export_run, hub_api, push

    api = None if options.push_to_hub is None else hub_api()  # before the work, for it may lack its token
    directory = RunDirectory.open(options.run)
    folder = export_run(directory, options.step, options.to, lambda line: sys.stdout.write(f"{line}\n"))
    if api is not None:
        sys.stdout.write(f"sent to {push(api, folder, options.push_to_hub)}\n")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Place a run on GPUs that need not be there and estimate its memory; with --rates, predict its step time."""
    config = _load(options)
    if options.rates is None:
        from cluster.simulation.dry_run import print_dry_run

        print_dry_run(config, options.gpus, options.gpu_memory)
        return 0
    from cluster.simulation.command import PlanOptions, print_plan

    print_plan(config, PlanOptions(options.rates, options.gpus, options.picture, options.save_rates, options.json))
    return 0


def fit_projection(options: argparse.Namespace) -> int:
    """Fit the projection bank that a run file names to what its student writes, and say how much it keeps."""
    config = _load(options)
    from cluster.run.fit_projection import FitOptions, fit_bank_of_run

    for line in fit_bank_of_run(config, FitOptions(options.rank, options.rows, options.teacher)):
        sys.stdout.write(f"{line}\n")
    return 0


def init(options: argparse.Namespace) -> int:
    """Write a first run file for two models and prompts, and say what was chosen and why."""
    from cluster.init import InitOptions, write_run_file

    names = InitOptions.__dataclass_fields__
    write_run_file(InitOptions(**{name: value for name, value in vars(options).items() if name in names}))
    return 0


def demo(options: argparse.Namespace) -> int:
    """Train the embedded student from the embedded teacher."""
    from cluster.demo import run_demo

    run_demo(options.arguments)
    return 0


def submit(options: argparse.Namespace) -> int:
    """Train on a cluster, as a job that is followed until its end."""
    config = _load(options)
    run_file, overrides = _split(options.arguments)
    assert run_file is not None
    from cluster.jobs.job_commands import Submission, parse_variables, submit_run

    variables = parse_variables(options.env)
    submission = Submission(Path(run_file), overrides, options.address, options.python, variables, options.resume)
    return submit_run(submission, config, wait=not options.no_wait)


def follow(options: argparse.Namespace) -> int:
    """Show what a job of a cluster has printed and prints."""
    from cluster.jobs.job_commands import follow_job

    return follow_job(options.address, options.job_id)


def stop(options: argparse.Namespace) -> int:
    """End a job of a cluster in order, with a checkpoint."""
    from cluster.jobs.job_commands import stop_job

    return stop_job(options.address, options.job_id)


class _Interleaving(argparse.ArgumentParser):
    """Takes overrides after options, and with dashes; argparse takes all positional arguments in one place."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, left = super().parse_known_args(args, namespace)
        if "arguments" in parsed:
            overrides = [text for text in left if not text.startswith("-") or DASHED_OVERRIDE.match(text)]
            parsed.arguments += [text.lstrip("-") for text in overrides]
            left = [text for text in left if text not in overrides]
        return parsed, left


def _load(options: argparse.Namespace) -> Config:
    run_file, overrides = _split(options.arguments)
    if run_file is None:
        raise ConfigError("no run file given; usage: preceptor train RUN.toml [section.field=value ...]")
    return load_run_config(Path(run_file), overrides)


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tell the run file, which comes first if at all, from the overrides."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": init,
    "train": train,
    "eval": evaluate,
    "check": check,
    "scale": scale,
    "teacher": teacher,
    "status": status,
    "report": report,
    "compare": compare,
    "verify": verify,
    "rows": rows,
    "export": export,
    "plan": plan,
    "fit-projection": fit_projection,
    "demo": demo,
    "submit": submit,
    "follow": follow,
    "stop": stop,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="preceptor", description="On-policy distillation of language models.")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Interleaving)
    add: dict[str, Callable[..., Any]] = {}  # an argument to a command
    for name, run in COMMANDS.items():
        command = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(command=run)
        add[name] = command.add_argument
    for name in ("train", "eval", "check", "plan", "submit", "fit-projection"):
        add[name]("arguments", nargs="*", metavar="RUN.toml [section.field=value ...]")
    for name in ("scale", "teacher", "status", "verify", "export", "rows"):
        add[name]("run", type=Path, metavar="RUN_DIRECTORY")
    for name in ("submit", "follow", "stop"):
        add[name]("--address", help="of the cluster's dashboard; else RAY_API_SERVER_ADDRESS")
    for name in ("follow", "stop"):
        add[name]("job_id", metavar="JOB_ID")
    add["compare"]("runs", type=Path, nargs="+", metavar="RUN_DIRECTORY")
    for name in ("status", "compare", "plan"):
        add[name]("--json", action="store_true", help="print one JSON object")
    _add_rows(add["rows"])
    add["status"]("--watch", action="store_true", help="show it until the run ends, or until Ctrl-C")
    _add_init(add["init"])
    add["train"]("--resume", type=Path, metavar="RUN_DIRECTORY")
    add["scale"]("sizes", nargs="+", metavar="rollout=6|teachers.NAME=3")
    add["teacher"]("change", choices=["replace"])
    add["teacher"]("name", metavar="NAME", help="of [teachers.NAME]")
    add["teacher"]("model", metavar="MODEL", help="a Hugging Face directory or a hub id")
    add["export"]("--step", type=int, metavar="N", help="of the checkpoint; else that of the last intact one")
    add["export"]("--to", type=Path, metavar="FOLDER", help="a new one; else RUN_DIRECTORY/export-step-N")
    add["export"]("--push-to-hub", metavar="ID", help="send it there too, by the token in HF_TOKEN")
    add["report"]("runs", nargs="+", type=Path, metavar="RUN_DIRECTORY")
    add["report"]("--out", type=Path, metavar="FILE.html", help="else report.html in the first run's directory")
    add["plan"]("--rates", type=Path, metavar="FILE|RUN_DIRECTORY", help="how fast stages are, to predict a step")
    add["plan"]("--gpus", type=int, help="to place the run on; with --rates, to share out")
    add["plan"]("--gpu-memory", type=float, metavar="GIB", help="of each GPU; without --rates")
    add["plan"]("--picture", type=Path, metavar="FILE.png", help="draw the prediction")
    add["plan"]("--save-rates", type=Path, metavar="FILE", help="write the rates of a run directory")
    add["fit-projection"]("--rank", type=int, default=8, metavar="N", help="dimensions of each layer")
    add["fit-projection"]("--rows", type=int, default=16_384, metavar="N", help="sampled tokens to fit it to, at most")
    add["fit-projection"]("--teacher", metavar="NAME", help="of [teachers.NAME], where there are several")
    add["demo"]("arguments", nargs="*", metavar="section.field=value")
    add["submit"]("--resume", action="store_true", help="go on with the run from its last checkpoint")
    add["submit"]("--no-wait", action="store_true", help="return when the job is submitted")
    add["submit"]("--env", action="append", default=[], metavar="NAME=VALUE", help="for driver and actors")
    add["submit"]("--python", default="python", help="the interpreter on the cluster's nodes")
    return parser


def _add_init(add: Callable[..., Any]) -> None:
    add("--student", required=True, metavar="MODEL", help="a Hugging Face directory or a hub id")
    add("--teacher", metavar="MODEL|URL", help="the same, or a server: http://host:8000/v1")
    add("--method", metavar="NAME", help="of docs/self_distillation.md; without --teacher, the student teaches itself")
    add("--teacher-model", metavar="NAME", help="of a server that serves several")
    add("--api-key-env", metavar="NAME", help="the environment variable that holds the server's key")
    add("--trust-remote-code", action="store_true", help="of student and teacher")
    add("--data", required=True, metavar="PROMPTS", help="as prompts.train of a run file")
    add("--out", type=Path, default=Path("run.toml"), metavar="FILE", help="the run file to write")
    add("--gpus", type=int, help="that the run will have; without, those of this machine")
    add("--gpu-memory", type=float, metavar="GIB", help="of each GPU")


def _add_rows(add: Callable[..., Any]) -> None:
    add("--where", metavar="CONDITION", help="such as 'reward > 0 and completion_tokens < 200'")
    add("--columns", metavar="A,B", help="to show, in the place of the usual ones")
    add("--limit", type=int, default=20, metavar="N", help="rows to show, at most")
    add("--json", action="store_true", help="print one JSON object per row")
    add("--text", action="store_true", help="show prompts and completions too")


if __name__ == "__main__":
    sys.exit(main())
