"""``dinov3-run`` from arguments to exit codes, with toy components in place of training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli
from attrs import define, evolve, field
from toy_configs import HereConfig, ToyConfig

from dinov3_framework import DataError, ExitCode, Plan, Registry, Task, __version__
from dinov3_framework.cli import main
from dinov3_framework.contracts.running import Job, JobHandle, Launcher, Resources
from dinov3_framework.errors import DivergenceError, StopRequested
from dinov3_framework.plugins import BrokenPlugin
from dinov3_framework.recipes.files import recipes_of

Write = Callable[[str, str], Path]

RECIPE = """
    task = "toy"
    iterations = 5
    lr = 0.1
    backbone = { use = "tiny" }
"""


@define
class Trace:
    """What the command line did with the toy components."""

    worlds: list[int] = field(factory=list)
    ran: list[tuple[ToyConfig, Path]] = field(factory=list)
    prepared: list[Path] = field(factory=list)
    jobs: list[Job] = field(factory=list)
    check_error: BaseException | None = None
    run_error: BaseException | None = None
    code: int = 0
    missing: list[str] = field(factory=list)
    elsewhere: bool = False
    preview: str = ""


@pytest.fixture
def trace(registry: Registry, write: Write, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """A recipe ``r.toml`` in an empty folder, and a command line that knows only toys."""
    trace = Trace()

    class Toy(Task):
        def check(self, world: int) -> Plan:
            trace.worlds.append(world)
            if trace.check_error:
                raise trace.check_error
            rows = [("parameters", "1,234"), ("width", "8")]
            return Plan({"model": rows, "empty": []}, trace.missing)

        def run(self, output_dir: Path, plan: Plan | None = None) -> None:
            raise AssertionError("what runs it is a toy, too")

    class ToyLauncher(Launcher):
        def __init__(self, config: HereConfig) -> None:
            self.processes = config.processes
            self.elsewhere = trace.elsewhere

        def world_size(self) -> int:
            return self.processes

        def preview(self, job: Job, resources: Resources | None = None) -> str:
            return trace.preview or f"{self.processes} processes here"

        def submit(
            self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
        ) -> JobHandle:
            trace.jobs.append(job)
            return Handle()

    class Handle(JobHandle):
        def wait(self) -> int:
            return trace.code

    def run_task(
        task: Any,
        config: ToyConfig,
        registry: Registry,
        output_dir: Path,
        plan: Plan | None,
        report: str,
    ) -> int:
        trace.ran.append((config, output_dir))
        if trace.run_error:
            raise trace.run_error
        return trace.code

    def prepare_output(
        config: ToyConfig, registry: Registry, output_dir: Path, report: str
    ) -> None:
        trace.prepared.append(output_dir)

    ours = Registry()
    factories = {"toy": lambda config, registry: Toy(), "here": ToyLauncher}
    for kind in ("backbone", "loss", "launcher", "task"):
        for name in registry.names(kind):
            component = registry.get(kind, name).component
            factory = factories.get(name, component.factory)
            ours.add(kind, evolve(component, factory=factory), "toys", "toy-box")
    monkeypatch.setattr(Registry, "load", classmethod(lambda cls, *_, **__: ours))
    monkeypatch.setattr("dinov3_framework.runtime.session.run_task", run_task)
    monkeypatch.setattr("dinov3_framework.runtime.session.prepare_output", prepare_output)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    write("r.toml", RECIPE)
    return trace


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# --------------------------------------------------------------------------- running
def test_a_run_in_this_process(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.toml", "iterations=7"]) == 0
    ((config, output_dir),) = trace.ran
    assert (config.iterations, output_dir) == (7, Path("runs/r"))
    assert config.output_dir == "runs/r", "the written recipe is complete"
    assert trace.worlds == [1]
    assert "parameters  1,234" in capsys.readouterr().out
    assert trace.jobs == trace.prepared == []


def test_options_and_overrides_mix(trace: Trace) -> None:
    arguments = ["--output-dir", "out dir/x=1", "r.toml", "iterations=7", "--traceback", "seed=3"]
    assert main(arguments) == 0
    ((config, output_dir),) = trace.ran
    assert (config.iterations, config.seed, output_dir) == (7, 3, Path("out dir/x=1"))


def test_several_recipes_are_one_run_of_the_first_ones_name(
    trace: Trace, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("over.toml", "iterations = 8\nseed = 8\nbackbone.depth = 3\nlauncher.use = 'here'")
    words = ["seed=9", "r.toml", "over.toml"]
    assert main([*words, "--print-recipe"]) == 0
    out = capsys.readouterr().out
    origins = {line.split(" = ")[0]: line.split("# ")[-1] for line in out.splitlines()}
    assert (origins["lr"], origins["iterations"]) == ("r.toml", "over.toml")
    assert (origins["depth"], origins["seed"]) == ("over.toml", "command line")
    assert main(words) == 0
    (job,) = trace.jobs
    assert job.output_dir == Path("runs/r"), "as with overrides: the same run on other machines"
    assert job.command[3] == "runs/r/recipe.toml"
    job.run()
    ((config, _),) = trace.ran
    assert (config.iterations, config.seed, config.backbone.depth) == (8, 9, 3)


def test_an_overlay_alone_is_no_recipe(
    trace: Trace, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("over.toml", "iterations = 8")
    for words in (["over.toml"], ["over.toml", "r.toml"]):
        assert main(words) == ExitCode.WRONG_INPUT
        err = capsys.readouterr().err
        assert err.startswith("over.toml: ")
        assert "overlay" in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["iterations=8"])
    assert "a recipe is needed" in capsys.readouterr().err
    assert trace.ran == trace.worlds == []


def test_the_exit_code_is_the_runs(trace: Trace) -> None:
    trace.code = 3
    assert main(["r.toml"]) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no images in there"), 2),
        (DivergenceError("loss is nan"), 3),
        (StopRequested("asked to stop"), 75),
    ],
)
def test_errors_for_people_come_without_a_traceback(
    trace: Trace, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    trace.run_error = error
    assert main(["r.toml"]) == code
    assert capsys.readouterr().err == f"{error}\n"
    assert main(["r.toml", "--traceback"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_the_program_shows_its_traceback(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.run_error = ZeroDivisionError("division by zero")
    assert main(["r.toml"]) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in err
    assert err.splitlines()[-1].startswith("this is a fault of the program")


def test_a_fault_of_a_plugin_names_its_distribution(
    trace: Trace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hats.py").write_text("def wear(hats):\n    return int(hats)\n")
    told = tmp_path / "fine_hats-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: fine-hats\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[dinov3_framework]\nhats = hats:parts\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import hats  # type: ignore[import-not-found]

    with pytest.raises(TypeError) as caught:
        hats.wear({})
    trace.run_error = caught.value
    assert main(["r.toml"]) == ExitCode.FAILED
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"a fault of a plugin of fine-hats, at {tmp_path / 'hats.py'}:2," in last


def test_an_exit_is_a_fault(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    trace.run_error = SystemExit(0)
    assert main(["r.toml"]) == ExitCode.FAILED
    assert "sys.exit(0) was called" in capsys.readouterr().err


def test_ctrl_c(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    trace.run_error = KeyboardInterrupt()
    assert main(["r.toml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["r.toml", "iteration=3"], "command line: iteration: unknown key"),
        (
            ["r.toml", "backbone.use=tini"],
            "command line: backbone.use: no backbone is named 'tini'",
        ),
        (["r.toml", "task=toi"], "command line: task: no task is named 'toi'"),
        (["x.toml"], "no such recipe: x.toml"),
        (["r.toml", "seed"], "no such recipe: seed"),
        (["r.toml", "over.toml", "seed"], "2 mistakes in this recipe:"),
        (["r.toml", "--launcher", "slurm"], "command line: launcher.use: no launcher is named"),
    ],
)
def test_a_wrong_recipe_writes_nothing(
    trace: Trace, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == ExitCode.WRONG_INPUT
    assert words in capsys.readouterr().err
    assert files() == ["r.toml"]
    assert trace.ran == trace.worlds == []


def test_a_failed_check_stops_before_anything_is_written(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.check_error = DataError("the folder is empty")
    assert main(["r.toml", "--launcher", "here"]) == ExitCode.WRONG_INPUT
    assert capsys.readouterr().err == "the folder is empty\n"
    assert (files(), trace.ran, trace.jobs, trace.prepared) == (["r.toml"], [], [], [])


# --------------------------------------------------------------------------- looking
def test_check_reports_and_writes_nothing(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "r.toml", "--launcher=here", "launcher.processes=4"]) == 0
    which, out = capsys.readouterr().out.split("\n\n", 1)
    assert which == f"recipe {Path('r.toml').absolute()}"
    model, output, launcher = out.split("\n\n")
    assert model == "model\n  parameters  1,234\n  width       8"
    assert output.split() == ["output", "folder", "runs/r,", "new"]
    assert launcher == "launcher\n  4 processes here\n"
    assert trace.worlds == [4]
    assert (files(), trace.ran, trace.jobs, trace.prepared) == (["r.toml"], [], [], [])


def test_print_recipe_is_complete_and_says_who_set_what(
    trace: Trace, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    assert main(["r.toml", "--print-recipe", "backbone.depth=3"]) == 0
    out = capsys.readouterr().out
    data = tomli.loads(out)
    assert data["backbone"] == {"use": "tiny", "depth": 3, "drop": 0.0, "norm": "layer"}
    lines = {line.split(" = ")[0]: line.split("# ")[-1] for line in out.splitlines() if "=" in line}
    assert (lines["iterations"], lines["depth"], lines["drop"]) == (
        "r.toml",
        "command line",
        "default",
    )
    write("whole.toml", out)
    assert main(["whole.toml", "--print-recipe"]) == 0
    assert tomli.loads(capsys.readouterr().out) == data
    assert trace.worlds == []


def test_list_and_describe(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "backbone\n  other  toys (toy-box)  Another backbone.\n  tiny   toys (toy-box)" in out
    assert "\n\nhead\n  none\n" in out
    assert main(["--list", "losses"]) == 0
    assert capsys.readouterr().out == "losses\n  pull  toys (toy-box)  A loss.\n"
    assert main(["--describe", "loss", "pull"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("loss pull, of plugin 'toys' (toy-box)\n\n  A loss.\n\n  weight   number")
    assert "\n  head     table; default as below\n           the projection head\n" in out
    assert "\n    width  integer; default 256\n           hidden width\n" in out
    assert main(["--describe", "loss", "pul"]) == 2
    assert "did you mean 'pull'" in capsys.readouterr().err
    assert main(["--list", "lossen"]) == 2


def test_list_recipes_shows_their_headers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "recipes"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "recipes"
    shown = {line.split()[0]: line for line in lines if line[2] != " "}
    assert set(shown) == set(recipes_of("dinov3_recipes"))
    for name, line in shown.items():
        assert len(line.split()) > 3, name
    assert "Overlay: one GPU" in shown["1gpu"]
    after = lines[lines.index(shown["quickstart"]) + 1 :]
    assert "Cost: 700 iterations" in after[0]
    assert "76.8 %" in after[1]


def test_broken_plugins_are_warned_of_on_every_command(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    Registry.load().broken.append(BrokenPlugin("bad", "bad-dist", "ImportError: x"))
    for arguments in (["--list"], ["r.toml", "--check"], ["r.toml"]):
        assert main(arguments) == 0
        err = capsys.readouterr().err
        assert err.startswith("warning: plugin 'bad' of distribution 'bad-dist' cannot be loaded")


def test_what_a_terminal_would_obey_reaches_it_escaped(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.run_error = DataError("cat\x1b[2J/caf\udce9\n    its hint")
    assert main(["r.toml"]) == ExitCode.WRONG_INPUT
    assert capsys.readouterr().err == "cat\\x1b[2J/caf\\xe9\n    its hint\n"


def test_usage(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "a recipe is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dinov3-framework {__version__}\n"


# --------------------------------------------------------------------------- launching
def test_a_launcher_gets_a_job(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    trace.code = 7
    asked: list[object] = []
    ours = Registry.load()

    def load(cls: type, *asked_for: object) -> Registry:
        asked.extend(asked_for)
        return ours

    monkeypatch.setattr(Registry, "load", classmethod(load))
    arguments = ["r.toml", "--launcher", "here", "launcher.processes=2"]
    arguments += ["--block-plugin", "a", "--block-plugin", "b", "--plugin", "x.py"]
    assert main(arguments) == 7
    (job,) = trace.jobs
    assert job.command == [
        *[sys.executable, "-m", "dinov3_framework", "runs/r/recipe.toml", "--launched"],
        *["--block-plugin", "a", "--block-plugin", "b", "--plugin", str(Path("x.py").absolute())],
    ]
    assert asked == [["a", "b"], ["x.py"]]
    assert job.output_dir == Path("runs/r")
    assert trace.prepared == [Path("runs/r")]
    assert trace.worlds == [2]
    assert trace.ran == []
    assert job.run() == 7
    assert len(trace.ran) == 1


def test_what_this_machine_lacks_other_machines_may_have(
    trace: Trace, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.missing = ["there is no folder /images"]
    arguments = ["r.toml", "--launcher", "here"]
    assert main(arguments) == ExitCode.WRONG_INPUT
    assert (trace.jobs, capsys.readouterr().err) == ([], "there is no folder /images\n")
    trace.elsewhere = True
    assert main(arguments) == 0
    assert len(trace.jobs) == 1
    assert "there is no folder /images" in capsys.readouterr().out, "it is said all the same"
    write("runs/r/recipe.toml", RECIPE + 'output_dir = "runs/r"\nlauncher = { use = "here" }\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    launched = trace.jobs[0].command[3:]
    assert main(launched) == ExitCode.WRONG_INPUT, "they look again, over there"
    trace.missing = []
    assert main(launched) == 0
    assert len(trace.ran) == 1


def test_a_script_is_shown_as_it_is(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    trace.preview = "#!/bin/sh\n\necho here"
    assert main(["--check", "r.toml", "--launcher=here"]) == 0
    assert capsys.readouterr().out.endswith("\nlauncher\n#!/bin/sh\n\necho here\n")


def test_processes_that_are_already_there_need_no_launcher(
    trace: Trace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(["r.toml", "--launcher", "here"]) == 0
    assert (len(trace.ran), trace.jobs, trace.worlds) == (1, [], [4])
    assert "parameters" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    Registry.load().broken.append(BrokenPlugin("bad", "bad-dist", "ImportError: x"))
    assert main(["r.toml", "--launcher", "here"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", ""), "only the first process talks"
    trace.run_error = DataError("no images")
    assert main(["r.toml"]) == 2
    assert capsys.readouterr().err == "[rank 3] no images\n"


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_launched_processes_run_and_are_neither_checked_nor_launched_again(
    trace: Trace,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
) -> None:
    """Whatever environment their launcher gives them: else each would start the next."""
    assert main(["r.toml", "--launcher", "here"]) == 0
    (job,) = trace.jobs
    write("runs/r/recipe.toml", RECIPE + 'output_dir = "runs/r"\nlauncher = { use = "here" }\n')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trace.worlds.clear()
    capsys.readouterr()
    assert main(job.command[3:]) == 0
    assert (trace.worlds, len(trace.ran), len(trace.jobs)) == ([], 1, 1)
    assert capsys.readouterr().out == ""


def test_by_hand_a_runs_recipe_is_checked_like_any(trace: Trace, write: Write) -> None:
    write("runs/r/recipe.toml", RECIPE + 'output_dir = "runs/r"\nlauncher = { use = "here" }\n')
    assert main(["runs/r/recipe.toml"]) == 0
    assert (trace.worlds, len(trace.jobs)) == ([1], 1)


# --------------------------------------------------------------------------- as a program
def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "dinov3_framework"]
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_and_lists_do_not_import_torch() -> None:
    code = (
        "import sys; from dinov3_framework.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    commands = (["--help"], ["--list"], ["--describe", "task", "pretrain"], ["no_such_recipe"])
    for arguments in commands:
        done = run(*arguments, code=code)
        assert done.returncode == 0, done.stderr
    assert "usage: dinov3-run" in run("--help", code=code).stdout


def test_python_m() -> None:
    done = run("--describe", "task", "pretrain")
    assert done.returncode == 0
    assert done.stdout.startswith("task pretrain, of plugin 'ssl' (dinov3-framework)")
    assert run("no_such_recipe").returncode == 2


@pytest.mark.parametrize(
    ("module", "words"),
    [("dinov3_framework.cli", "--list"), ("dinov3_framework.weights.cli", "list")],
)
def test_a_reader_that_goes_away_is_no_mistake(module: str, words: str) -> None:
    # /dev/full would be another error; a closed pipe is what `| head` leaves behind.
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys, {module} as m; sys.exit(m.main(['{words}']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Broken" not in err
    assert "Traceback" not in err
