"""The example plugin, installed as a stranger's would be, takes part in everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_support import started

ROOT = Path(__file__).parents[2]
NAME = "dinov3_example_plugin"
FAULTS = ROOT / "tests" / "support" / "faults_plugin"  # offers an observer that kills a run
RECIPE = f"{NAME}:fashion_vicreg"
TINY = (
    "iterations=6",
    "batch_size=12",
    "log_every=1",
    "backbone.embed_dim=16",
    "backbone.depth=2",
    "augmentation.local_crops=2",
    "losses.dino.head={ n_prototypes = 32, bottleneck_dim = 8, hidden_dim = 16 }",
    "losses.ibot.head={ n_prototypes = 24, bottleneck_dim = 8, hidden_dim = 16 }",
    "losses.vicreg.hidden_dim=16",
    "losses.vicreg.output_dim=12",
    "optimizer.lr.warmup=2",
    "loader.workers=0",
    "checkpoint.every=2",
)
TWO = ("launcher.use=local", "launcher.processes=2")

Start = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's source, where a build may leave its traces."""
    folder = tmp_path_factory.mktemp("example") / NAME
    shutil.copytree(ROOT / "examples" / NAME, folder)
    return folder


@pytest.fixture(scope="module")
def start(copied: Path) -> Start:
    """Install the example beside the framework; then ``start("-m", module, ...)`` runs Python."""
    site = copied.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), str(copied)]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *offline], check=True, capture_output=True, text=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(site), str(FAULTS), os.environ.get("PYTHONPATH", "")]
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def start(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return started([sys.executable, *arguments], env=environment, cwd=cwd).finish()

    return start


def train(start: Start, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = ("-m", "dinov3_framework", RECIPE, "--output-dir", str(output))
    return start(*command, *TINY, *overrides)


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the example's recipe in one process."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = train(start, output)
    assert done.returncode == 0, done.stderr
    return output


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of training steps; observers of the extended recipe may write others."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def learnt(output: Path) -> list[dict[str, float]]:
    timing = ("images_per_second", "data_wait", "time/")
    return [{k: v for k, v in line.items() if not k.startswith(timing)} for line in metrics(output)]


CHECKPOINT = """
import json, sys
from pathlib import Path
from torch.distributed.checkpoint import FileSystemReader

folder = sorted(Path(sys.argv[1]).glob("step_*"))[-1]
metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
print(json.dumps({name: list(entry.size) for name, entry in metadata.items()}))
"""


def test_its_own_tests_pass(start: Start, copied: Path) -> None:
    done = start("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=copied)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_is_listed_and_described(start: Start) -> None:
    listed = start("-u", "-m", "dinov3_framework", "--list")  # a new Python, and no fork
    assert listed.returncode == 0, listed.stderr
    assert "conv_mixer" in listed.stdout
    described = start("-m", "dinov3_framework", "--describe", "loss", "vicreg")
    assert "width of the embeddings" in described.stdout
    assert "1024" in described.stdout


def test_its_loss_is_in_the_metrics(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        terms = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
        total = sum(factor * line[f"vicreg/{name}"] for name, factor in terms.items())
        assert line["vicreg"] == pytest.approx(total, rel=1e-4)
        assert line["vicreg/weight"] == 0.1
        assert line["gradient_norm/vicreg_head"] > 0
        assert not any(name.startswith("koleo") for name in line)


def test_the_recipe_extends_the_installed_one(whole: Path) -> None:
    written = (whole / "recipe.toml").read_text()
    assert 'use = "conv_mixer"' in written
    assert 'use = "fashion_mnist"' in written


def test_its_projector_and_twin_are_in_the_checkpoint(start: Start, whole: Path) -> None:
    done = start("-c", CHECKPOINT, str(whole / "checkpoints"))
    assert done.returncode == 0, done.stderr
    shapes = json.loads(done.stdout)
    for network in ("student", "teacher"):
        assert shapes[f"{network}.vicreg_head.mlp.0.weight"] == [16, 16]
        assert shapes[f"{network}.vicreg_head.mlp.6.weight"] == [12, 16]
        assert shapes[f"{network}.backbone.blocks.1.channels.weight"] == [16, 16, 1, 1]
    moments = [name for name in shapes if "vicreg_head.mlp.6.weight" in name and "exp_avg" in name]
    assert len(moments) == 2


def test_its_backbone_loads_from_the_export(start: Start, whole: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from dinov3_framework import load_backbone\n"
        "loaded = load_backbone(sys.argv[1])\n"
        "images = torch.arange(2 * 28 * 28, dtype=torch.float32).view(2, 1, 28, 28) % 251\n"
        "torch.save(loaded.features(images.to(torch.uint8)), sys.argv[2])\n"
        "assert type(loaded.backbone).__module__ == 'dinov3_example_plugin.conv_mixer'\n"
    )
    export = whole / "exports" / "teacher_backbone.safetensors"
    done = start("-c", script, str(export), str(tmp_path / "features.pt"))
    assert done.returncode == 0, done.stderr
    features = torch.load(tmp_path / "features.pt", weights_only=True)
    assert features.shape == (2, 16)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])


def test_without_the_plugin_its_export_is_refused(start: Start, whole: Path) -> None:
    export = str(whole / "exports" / "teacher_backbone.safetensors")
    script = (
        "import sys\n"
        "from dinov3_framework import Registry, load_backbone\n"
        "load_backbone(sys.argv[1], registry=Registry.load(block=['example']))\n"
    )
    done = start("-c", script, export)
    assert done.returncode != 0
    assert "conv_mixer" in done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    killed = train(start, output, "observers.killer.use=signal_at", "observers.killer.iteration=5")
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "results.json").exists()
    resumed = train(start, output)
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on after iteration 4" in (output / "run.log").read_text()
    assert learnt(output) == learnt(whole)


def test_two_sharded_processes_learn_the_same(start: Start, whole: Path, tmp_path: Path) -> None:
    """VICReg's statistics are the global batch's, so splitting it changes rounding only."""
    output = tmp_path / "two"
    done = train(start, output, *TWO)
    assert done.returncode == 0, done.stderr
    assert "2 x 1 micro-batches x 6 images" in done.stdout
    two, one = learnt(output), learnt(whole)
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


def test_nothing_outside_mentions_it() -> None:
    words = (NAME, "conv_mixer", "vicreg_head", "fashion_vicreg")
    sources = [
        file
        for folder in ("dinov3_framework", "plugins", "recipes")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".pyi", ".toml")
    ]
    assert len(sources) > 50
    mentioned = [
        (str(file.relative_to(ROOT)), word)
        for file in [*sources, ROOT / "pyproject.toml"]
        for word in words
        if word in file.read_text("utf-8")
    ]
    assert mentioned == []


def test_its_backbone_learns_from_and_teaches_others(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    """A conv mixer's student is a ViT, and that ViT's a conv mixer."""
    recipe = str(ROOT / "tests" / "support" / "tiny_distill.toml")
    heads = (  # those of the run that teaches
        "losses.dino.head={ n_prototypes = 32, bottleneck_dim = 8, hidden_dim = 16, n_layers = 2 }",
        "losses.ibot.head={ n_prototypes = 24, bottleneck_dim = 8, hidden_dim = 16, n_layers = 2 }",
    )
    command = ("-m", "dinov3_framework", recipe, "iterations=3", *heads)
    vit, mixer = tmp_path / "vit", tmp_path / "mixer"
    done = start(*command, "--output-dir", str(vit), f"teacher.weights={whole}")
    assert done.returncode == 0, done.stderr
    assert "no projector of loss" not in done.stdout + done.stderr
    backbone = ("backbone.use=conv_mixer", "backbone.embed_dim=16", "backbone.depth=2")
    done = start(*command, *backbone, "--output-dir", str(mixer), f"teacher.weights={vit}")
    assert done.returncode == 0, done.stderr
    assert all(line["ibot"] > 0 for line in metrics(mixer))


# --------------------------------------------------------------------------- its own trainings
CLOTHES = """
[images]
channels = 1
mean = [0.5]
std = [0.25]

[backbone]
use = "conv_mixer"
patch_size = 7
embed_dim = 16
depth = 2

[optimizer]
use = "rmsprop"
lr = 1e-3
weight_decay = 0.01

[loader]
workers = 1

[checkpoint]
every = 2

[observers.journal]
use = "journal"

[dataset]
use = "images_and_masks"
images = "images"
masks = "masks"
classes = [CLASSES]
"""
HEAD = """
[transform]
use = "square"
size = 28
flip = 0.5

[head]
use = "linear_TARGET"

[observers.evaluate]
use = "evaluate"
every = 3

[observers.evaluate.evaluations.agreement]
use = "agreement"
target = "NAME"

[observers.evaluate.evaluations.agreement.dataset]
use = "images_and_masks"
images = "images"
masks = "masks"
classes = [CLASSES]

[observers.evaluate.evaluations.agreement.transform]
use = "square"
"""
STEPS = "iterations = 6\nbatch_size = 12\nlog_every = 1\n"
KILLED = ("observers.killer.use=signal_at", "observers.killer.iteration=5")


@pytest.fixture(scope="module")
def clothes(start: Start, copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, masks and archives, and recipes that read them."""
    folder = tmp_path_factory.mktemp("clothes")
    done = start(str(copied / "tests" / "clothes.py"), str(folder))
    assert done.returncode == 0, done.stderr
    classes = start("-c", "from clothes import CLASSES; print(*CLASSES)", cwd=copied / "tests")
    assert classes.returncode == 0, classes.stderr
    listed = ", ".join(f'"{name}"' for name in classes.stdout.split())

    def write(name: str, task: str, text: str) -> None:
        recipe = f'task = "{task}"\n{STEPS}{CLOTHES}{text}'.replace("CLASSES", listed)
        (folder / name).write_text(recipe)

    write("class.toml", "train_head", HEAD.replace("TARGET", "class").replace("NAME", "label"))
    write("mask.toml", "train_head", HEAD.replace("TARGET", "mask").replace("NAME", "mask"))
    write("contrast.toml", "contrastive", "")
    return folder


def run(start: Start, clothes: Path, recipe: str, *more: str) -> subprocess.CompletedProcess[str]:
    return start("-m", "dinov3_framework", recipe, *more, cwd=clothes)


STREAM = 'dataset={ use = "tar_stream", archives = ["a.tar", "b.tar"] }'


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("class.toml", ()),
        ("mask.toml", ()),
        ("contrast.toml", ()),
        ("contrast.toml", (STREAM,)),
    ],
    ids=["class", "mask", "contrast", "stream"],
)
def test_a_training_is_killed_and_goes_on_to_the_same_bits(
    start: Start, clothes: Path, recipe: str, more: tuple[str, ...], processes: int
) -> None:
    launched = TWO if processes == 2 else ()
    name = f"{recipe[:-5]}{len(more)}_{processes}"
    done = run(start, clothes, recipe, *more, *launched, "--output-dir", f"{name}_whole")
    assert done.returncode == 0, done.stderr
    killed = run(start, clothes, recipe, *more, *launched, *KILLED, "--output-dir", name)
    assert killed.returncode != 0
    resumed = run(start, clothes, recipe, *more, *launched, "--output-dir", name)
    assert resumed.returncode == 0, resumed.stderr
    assert learnt(clothes / name) == learnt(clothes / f"{name}_whole")
    ours, theirs = (
        sorted((clothes / each / "exports").glob("*.safetensors"))
        for each in (name, f"{name}_whole")
    )
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))
    journal = (clothes / name / "journal.txt").read_text().splitlines()
    assert "begins after iteration 4" in journal
    assert journal[-1] == "ends"
    if processes == 2 and not more:
        one = learnt(clothes / f"{recipe[:-5]}0_1_whole")
        for two, single in zip(learnt(clothes / name), one, strict=True):
            assert two["loss"] == pytest.approx(single["loss"], rel=1e-4)


@pytest.mark.parametrize(("recipe", "metric"), [("class", "accuracy"), ("mask", "miou")])
def test_a_trained_head_is_evaluated_by_itself(
    start: Start, clothes: Path, recipe: str, metric: str
) -> None:
    """The task ``evaluate`` finds what the observer of the training found."""
    whole = clothes / f"{recipe}0_1_whole"
    if not whole.exists():
        assert run(start, clothes, f"{recipe}.toml", "--output-dir", str(whole)).returncode == 0
    text = (clothes / f"{recipe}.toml").read_text()
    backbone = text[text.index("[images]") : text.index("[optimizer]")]
    evaluation = text[text.index("[observers.evaluate.evaluations") :]
    evaluation = evaluation.replace("observers.evaluate.", "")
    head = f'head = "{whole / "exports" / "head.safetensors"}"\n'
    (clothes / "evaluate.toml").write_text(f'task = "evaluate"\n{head}{backbone}{evaluation}')
    output = clothes / f"{recipe}_evaluated"
    done = run(start, clothes, "evaluate.toml", "--output-dir", str(output))
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((output / "results.json").read_text())["records"]
    trained = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert record["metric"] == metric
    assert record["value"] == pytest.approx(trained[-1][metric])


def test_a_run_in_the_background(start: Start, clothes: Path) -> None:
    output = clothes / "background"
    done = run(
        start, clothes, "contrast.toml", "--output-dir", str(output), "launcher.use=background"
    )
    assert done.returncode == 0, done.stderr
    assert "background.log" in done.stdout
    for _ in range(600):
        if (output / "results.json").exists():
            break
        time.sleep(0.2)
    assert learnt(output)[-1]["iteration"] == 6
