"""``dinov3-run``: from a recipe to a run.

Nothing here imports torch before a task is built, so that help, lists and most mistakes come at
once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov3_framework import __version__
from dinov3_framework.blame import as_error, author_of, describe_error, line_of
from dinov3_framework.errors import (
    DataError,
    ExitCode,
    Problem,
    RecipeError,
    UserError,
    escape_unencodable,
    printable,
)
from dinov3_framework.kinds import resolve
from dinov3_framework.runtime.stopping import (
    LAUNCHER,
    EndOnSignal,
    Interrupted,
    describe_stop,
    end_with,
    exit_code_of,
)

if TYPE_CHECKING:
    from dinov3_framework.contracts.running import Job, Launcher, Plan, Task
    from dinov3_framework.kinds import Flag, TaskConfig
    from dinov3_framework.registry import Registry

_EPILOG = """\
A recipe is a file, an installed recipe's name, or package:recipe. Several are put one over the
other, from left to right; key=value replaces one value of what comes of them, in TOML syntax, where
a bare word is a string:
  dinov3-run recipes/my.toml 8gpu optimizer.lr=1e-4 backbone.use=vit_small

exit codes: 0 done, 1 a fault of the program, 2 the recipe, the data or the output folder has to
change first, 3 training diverged, 75 stopped by SIGTERM, SIGUSR2 or SIGHUP (the same command goes
on), 130 Ctrl-C
"""

LAUNCHED = "--launched"
_LONGEST = 255  # bytes of a name on the file systems of Linux


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    Without ``argv`` it is the program: signals end it, with the exit codes of :data:`_EPILOG`.
    """
    if argv is not None:
        return _main(argv)
    if launcher := os.environ.pop(LAUNCHER, None):
        end_with(int(launcher))
    with EndOnSignal() as ending:
        try:
            ending.code = _main(sys.argv[1:])
        except Interrupted as error:  # while an error was about to be said
            ending.code = exit_code_of(error.received)
    return ending.code


def _main(argv: Sequence[str]) -> int:
    escape_unencodable()
    options = argparse.Namespace(traceback="--traceback" in argv)
    try:
        from dinov3_framework.registry import Registry

        registry = Registry.load(*_plugins(argv))
        options = _parse(argv, registry)
        try:
            return _dispatch(options, registry)
        except SystemExit as error:
            raise as_error(error) from None
        except Exception:
            EndOnSignal.let_finish()  # others of the job may be stopped for it
            raise
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        if not (error.shared and _rank()):
            _complain(describe_error(error))
        return int(error.exit_code)
    except KeyboardInterrupt as error:
        if options.traceback:
            traceback.print_exc()
        received = error.received if isinstance(error, Interrupted) else signal.SIGINT
        if not _rank():
            _complain(describe_stop(received))
        return int(exit_code_of(received))
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _complain(f"{error.filename}: {error.strerror}; give a shorter path")
            return int(ExitCode.WRONG_INPUT)
        traceback.print_exc()
        author = author_of(error)
        _complain(describe_error(error), always=True)
        where = "the program" if author is None else f"a plugin of {author}"
        if author is not None and (line := line_of(error, author)):
            where += f", at {line}"
        _complain(f"this is a fault of {where}, not of your recipe; please report it as it is")
        return int(ExitCode.FAILED)


def _plugins(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Plugins to leave out and files of more, to be known before the flags that plugins bring."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--block-plugin", action="append", default=[])
    parser.add_argument("--plugin", action="append", default=[])
    known = parser.parse_known_args(argv)[0]
    return known.block_plugin, known.plugin


def _parse(argv: Sequence[str], registry: Registry) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dinov3-run",
        description="Run a recipe: training, evaluation, export.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="RECIPE ... key=value", help="what to run; see below")
    add("--check", action="store_true", help="say what would run, and write nothing")
    for flag in registry.flags.values():
        add(f"--{flag.name}", action="store_true", help=flag.help)
        for name, (kind, placeholder, text) in flag.options.items():
            add(f"--{name}", type=kind, metavar=placeholder, help=text)
    add("--print-recipe", action="store_true", help="print the complete recipe and who set what")
    add("--output-dir", metavar="DIR", help="folder of all that the run writes")
    add(
        "--overwrite",
        action="store_true",
        help="first delete what the same task wrote into that folder before; not for trainings",
    )
    add("--launcher", metavar="NAME", help="where the processes come from (launcher.use=NAME)")
    add(
        "--list",
        nargs="?",
        const="",
        metavar="KIND",
        help="list components, of a kind or all, or recipes",
    )
    add("--describe", nargs=2, metavar=("KIND", "NAME"), help="show a component's options")
    add(
        "--block-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a plugin out (may be repeated; also DINOV3_BLOCK_PLUGINS=a,b)",
    )
    add(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="load a Python file with hooks as if it were installed (may be repeated)",
    )
    # For launchers: the process is one of a job, and must not be submitted again.
    add(LAUNCHED, action="store_true", help=argparse.SUPPRESS)
    add("--traceback", action="store_true", help="show where an error came from")
    add("--version", action="version", version=f"dinov3-framework {__version__}")
    from dinov3_framework.recipes.compose import is_override

    options = parser.parse_intermixed_args(argv)
    options.overrides = [word for word in options.words if is_override(word)]
    options.recipes = [word for word in options.words if word not in options.overrides]
    if not (options.recipes or options.list is not None or options.describe is not None):
        parser.error("a recipe is needed: a file, an installed recipe's name, or package:recipe")
    for flag in registry.flags.values():
        if not _given(options, flag.name) and any(_given(options, each) for each in flag.options):
            names = " and ".join(f"--{each}" for each in flag.options)
            parser.error(f"{names} go with --{flag.name}")
    return options


def _given(options: argparse.Namespace, name: str) -> Any:
    """What was given for a flag that a plugin brought."""
    return getattr(options, name.replace("-", "_"))


def _dispatch(options: argparse.Namespace, registry: Registry) -> int:
    if _rank() in (None, 0):
        for warning in (*registry.broken, *registry.printed):
            _complain(f"warning: {warning}")
    if options.list is not None or options.describe is not None:
        from dinov3_framework.recipes import describe as console

        if options.list is not None:
            return _show(console.listing(registry, options.list or None))
        return _show(console.description(registry.describe(*options.describe)))
    return _recipe(options, registry)


def _recipe(options: argparse.Namespace, registry: Registry) -> int:
    from dinov3_framework.configs import replace
    from dinov3_framework.recipes.compose import compose
    from dinov3_framework.recipes.plain import unstructure
    from dinov3_framework.recipes.structure import structure_recipe
    from dinov3_framework.recipes.toml_text import annotated_toml
    from dinov3_framework.runtime.output import check_output, check_overwrite, overwrite

    composed = compose(options.recipes, _overrides(options))
    config = structure_recipe(registry, composed)
    if options.print_recipe:
        return _show(annotated_toml(unstructure(registry, config), composed.origins).rstrip())
    output_dir = Path(config.output_dir or f"runs/{config.run_name(composed.name)}")
    for part in output_dir.parts:
        if len(os.fsencode(part)) > _LONGEST:
            what = f"{part[:40]}... has more than {_LONGEST} bytes, too long for a folder's name"
            raise RecipeError([Problem("output_dir", what, "choose a shorter --output-dir")])
    config = replace(config, output_dir=str(output_dir))
    task: Task = registry.build(config, registry=registry)
    launcher = None if options.launched else _launcher(config, registry)
    for flag in registry.flags.values():
        if _given(options, flag.name):
            return _show(_flag(flag, task, launcher, options))
    plan: Plan | None = None
    code, report = int(ExitCode.OK), ""

    def run() -> int:
        from dinov3_framework.runtime import session

        parallel = getattr(config, "parallel", None)
        chosen = {"device": parallel.device, "timeout": parallel.timeout} if parallel else {}
        return int(
            session.run_task(task, config, registry, output_dir, plan, report=report, **chosen)
        )

    job = _job(output_dir, options, run)
    # The process that launched this one has checked everything, if on a machine like this.
    if not options.launched or _is_elsewhere(config, registry):
        try:
            plan = _check(task, launcher, may_miss=options.check)
        except RecipeError as error:
            raise composed.located(error) from error
        if _rank() in (None, 0):
            which = f"recipe {' + '.join(composed.paths)}"
            report = f"{which}\n\n{_plan_text(task, plan, launcher, job)}"
            code = _show(report)
        if options.check:
            (check_overwrite if options.overwrite else check_output)(config, registry, output_dir)
            is_lacking = plan.missing and not (launcher and launcher.elsewhere)
            return ExitCode.WRONG_INPUT if is_lacking else code
    if options.overwrite and _rank() in (None, 0):
        overwrite(config, registry, output_dir)
    if launcher is None:
        return run()
    return _submit(launcher, job, config, registry, report)


def _overrides(options: argparse.Namespace) -> list[str]:
    from dinov3_framework.recipes.toml_text import inline

    overrides = list(options.overrides)
    for key, value in (("launcher.use", options.launcher), ("output_dir", options.output_dir)):
        if value is not None:
            overrides.append(f"{key}={inline(value)}")
    return overrides


# --------------------------------------------------------------------------- running
def _rank() -> int | None:
    """This process's place in a job, if something outside has started one."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"])
    return None


def _launcher(config: TaskConfig, registry: Registry) -> Launcher | None:
    """The recipe's launcher; none if the processes are already there."""
    if config.launcher is None or _rank() is not None:
        return None
    launcher: Launcher = registry.build(config.launcher)
    return launcher


def _is_elsewhere(config: TaskConfig, registry: Registry) -> bool:
    """Whether the launcher's processes are on machines that may lack what the caller had."""
    return config.launcher is not None and bool(registry.build(config.launcher).elsewhere)


def _check(task: Task, launcher: Launcher | None, may_miss: bool) -> Plan:
    """What the task would do; what the machine that runs it lacks is an error unless it may."""
    outside = int(os.environ["WORLD_SIZE"]) if _rank() is not None else 1
    plan = task.check(launcher.world_size() if launcher else outside)
    if plan.missing and not (may_miss or (launcher and launcher.elsewhere)):
        raise DataError("\n".join(plan.missing))
    return plan


def _plan_text(task: Task, plan: Plan, launcher: Launcher | None, job: Job) -> str:
    from dinov3_framework.configs import replace
    from dinov3_framework.recipes.describe import report_text
    from dinov3_framework.runtime.output import is_complete

    state = "begun before" if job.output_dir.exists() else "new"
    if is_complete(job.output_dir):
        state = "complete"
    elif done := task.progress():
        state = f"goes on after {done}"
    output = {"output": [("folder", f"{job.output_dir}, {state}")]}
    text = report_text(replace(plan, sections={**plan.sections, **output}))
    if launcher is None:
        return text
    preview = launcher.preview(job)
    is_script = "\n" in preview  # to be copied as it stands
    return f"{text}\n\nlauncher\n{preview if is_script else f'  {preview}'}"


def _flag(flag: Flag, task: Task, launcher: Launcher | None, options: argparse.Namespace) -> str:
    """What a plugin does with the recipe in place of running it."""
    if _rank() is not None:
        raise UserError(f"--{flag.name} runs in one process: start it alone, without torchrun")
    given = {name.replace("-", "_"): _given(options, name) for name in flag.options}
    values = {name: value for name, value in given.items() if value is not None}
    world = launcher.world_size() if launcher else 1
    act = resolve(flag.run, f"--{flag.name}: its function")
    return str(act(task, **({"world_size": world} | values)))


def _submit(
    launcher: Launcher, job: Job, config: TaskConfig, registry: Registry, report: str
) -> int:
    """Hand a job to its launcher and wait for it, where that is what the launcher does."""
    from dinov3_framework.runtime import session

    session.prepare_output(config, registry, job.output_dir, report)
    handle = launcher.submit(job)
    if text := handle.describe():
        print(text, flush=True)
    return int(handle.wait())


def _job(output_dir: Path, options: argparse.Namespace, run: Any) -> Job:
    from dinov3_framework.contracts.running import Job

    command = [sys.executable, "-m", "dinov3_framework", str(output_dir / "recipe.toml"), LAUNCHED]
    for name in options.block_plugin:
        command += ["--block-plugin", name]
    for file in options.plugin:
        command += ["--plugin", os.path.abspath(os.path.expanduser(file))]
    return Job(command=command, output_dir=output_dir, run=run, name=output_dir.name)


# --------------------------------------------------------------------------- printing
def _show(text: str) -> int:
    """Print to standard output; a reader that went away (``| head``) is no mistake."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return ExitCode.OK


def _complain(message: str, always: bool = False) -> None:
    """Print to standard error; ``always`` with the rank, where there are several."""
    rank = _rank()
    prefix = f"[rank {rank}] " if rank or (always and rank is not None) else ""
    with suppress(OSError):  # nobody reads it any more; the exit code says it, too
        print(printable(f"{prefix}{message}"), file=sys.stderr, flush=True)
