"""Every recipe of this project is sound, says what it costs, and runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from dinov3_depth.configs_evaluation import DepthConfig
from PIL import Image

from dinov3_framework import Constant, Cosine, ExitCode, Registry, Target
from dinov3_framework.cli import main
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.parallel.compiling import compiler_complaint
from dinov3_framework.recipes.compose import compose, is_override
from dinov3_framework.recipes.files import FORMERLY
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.schedules import OneCycle

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.toml"))}
NAMES = [name for name, path in FILES.items() if "task" in compose(path).data]

# Recipes with the overlays that are for them.
STAGES = [
    *("vitl_im1k", "vits_pretrain", "vitb_pretrain", "vitl_pretrain", "vith_plus_pretrain"),
    *("vits_gram_anchor", "vitb_gram_anchor", "vitl_gram_anchor", "vith_plus_gram_anchor"),
]
HIGH_RES = [f"{size}_high_res_adapt" for size in ("vits", "vitb", "vitl", "vith_plus")]
OVERLAID = [
    *((stage, overlay) for overlay in ("1gpu", "8gpu") for stage in STAGES),
    *((stage, overlay) for overlay in ("1gpu_high_res", "8gpu_high_res") for stage in HIGH_RES),
]
SMALLER = [("my_images", "cpu")]
RUNNABLE = [*((name,) for name in NAMES), *OVERLAID, *SMALLER]


def test_there_are_recipes_and_overlays() -> None:
    assert {"quickstart", "knn", "vit7b_pretrain", "vitl_im1k"} <= set(NAMES)
    assert FILES.keys() - set(NAMES) == {overlay for _, overlay in [*OVERLAID, *SMALLER]}


@pytest.mark.parametrize("names", RUNNABLE, ids=" ".join)
def test_a_recipe_passes_its_check(
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(FILES[name]) for name in names]
    config = structure_recipe(Registry.load(), compose(words))
    weights = getattr(config, "weights", None)
    takes = weights is not None or "[shorthand.weights]" in FILES[names[0]].read_text()
    here = [f"weights={_export(tmp_path)}"] if takes else []
    if isinstance(getattr(config, "head", None), str):
        here.append(f"head={_head(tmp_path, config)}")
    if names == ("predict",):  # its weights are a head's
        here = [f"backbone={_export(tmp_path)}", f"weights={_head(tmp_path, config)}"]
        here.append(f"images={_images(tmp_path)}")
    if compiler_complaint(torch.device("cpu")) and hasattr(config, "parallel"):
        here.append("parallel.compile=false")
    if getattr(config, "epochs", None) and hasattr(config.dataset, "root"):  # to count them by
        here.append(f"dataset.root={_images(tmp_path)}")
    code, shown = main([*words, "--check", *here]), capsys.readouterr()
    lacks = "could not run here as it stands" in shown.out
    assert code == (ExitCode.WRONG_INPUT if lacks else ExitCode.OK), shown.err
    assert shown.out.strip()
    assert not shown.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_a_recipe_is_found_by_its_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(path.stem).data == compose(path).data


def test_recipes_that_went_are_composed_now() -> None:
    registry = Registry.load()
    for name, now in json.loads((ROOT / "recipes" / FORMERLY).read_text()).items():
        assert name not in FILES
        words = {
            kind: [word for word in now.split() if is_override(word) == kind]
            for kind in (True, False)
        }
        structure_recipe(registry, compose(words[False], words[True]))


def _images(folder: Path) -> Path:
    """A folder with a few images."""
    images = folder / "images"
    images.mkdir()
    for shade in range(3):
        Image.new("RGB", (260, 240), (shade, 60, 90)).save(images / f"{shade}.jpg")
    return images


# Its patches divide the sizes of all recipes, and those of Fashion-MNIST.
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}


def _export(folder: Path) -> Path:
    """Weights such as an earlier recipe would have left."""
    from dinov3_framework.configs import ImagesConfig
    from dinov3_framework.weights.export import export_backbone

    backbone = Registry.load().build("backbone", "vit", **TINY)
    backbone.init_weights()
    path = folder / "weights.safetensors"
    export_backbone(
        path,
        backbone.state_dict(),
        component="vit",
        config=TINY,
        images=ImagesConfig(channels=1, mean=(0.286,), std=(0.353,)),
        size=28,
        provenance={},
    )
    return path


def _head(folder: Path, config: Any) -> Path:
    """A head on these weights such as an earlier recipe would have left."""
    from dinov3_framework.configs import ImagesConfig
    from dinov3_framework.parallel.state_dicts import full_tensors
    from dinov3_framework.weights.export import export_tensors
    from dinov3_framework.weights.heads import head_info

    registry = Registry.load()
    features = registry.build("backbone", "vit", **TINY).feature_info
    component = "linear_segmentation"
    targets = {"mask": Target("mask", n_classes=150, ignore_index=255)}
    if any(isinstance(each, DepthConfig) for each in getattr(config, "evaluations", {}).values()):
        component, targets = "linear_depth", {"depth": Target("map", unit="m")}
    head = registry.build("head", component, features=features, targets=targets)
    images = ImagesConfig(channels=1, mean=(0.286,), std=(0.353,))
    tensors = dict(full_tensors(head))
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    info = head_info(component, {}, images, 28, targets, {})
    export_tensors(folder / "head.safetensors", specs, tensors.items(), info.to_metadata())
    return folder / "head.safetensors"


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_the_header_states_command_cost_and_expectation(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line)
    text = "\n".join(header)
    for word in ("Run", "Cost", "Expected") if path.stem in NAMES else ("Overlay", "Run"):
        assert re.search(rf"^# {word}: +[^\s@]", text, re.MULTILINE), f"{path.name} lacks {word}:"
    commands = re.findall(r"(?:dinov3-run|recipes)[ /](\S+)(?: (\w+))?", text)
    assert path.stem in {Path(word).stem for command in commands for word in command}


def test_the_documentation_lists_every_recipe_of_a_training() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    listed = set(re.findall(r"`(\w+)`", page.partition("\n## Recipes\n")[2]))
    tasks = {"pretrain", "distill", "multi_distill", "pipeline"}
    trainings = {name for name in NAMES if compose(name).data["task"] in tasks}
    assert trainings | (FILES.keys() - set(NAMES)) <= listed


# --------------------------------------------------------------------------- values
# What the published files say, by recipe, where an inherited value could pass for it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit7b_pretrain": {
        "batch_size": 16 * 256,
        "losses.dino.local_weight": Constant(value=1.0),
        "optimizer.clip_grad": 30.0,
        "parallel.checkpointing": "selective",
        "parallel.compile": True,
        "checkpoint.every": 1000,
        "checkpoint.keep_every": 50_000,
        "backbone.drop_path_rate": 0.4,
        "backbone.pos_embed_rope_rescale_coords": 2.0,
        "backbone.untie_global_and_local_cls_norm": True,
        "augmentation.horizontal_flips": False,
    },
    "vit7b_gram_anchor": {
        "batch_size": 16 * 256,
        "augmentation.anchor_size": 512,
        "augmentation.anchor_without_distortions": True,
        "losses.dino.local_weight": Cosine(
            start=1.0, peak=1.0, end=0.5, warmup=1_000_000, cosine=1000
        ),
        "losses.gram.weight": Cosine(start=0.0, peak=0.0, end=2.0, warmup=1_000_000, cosine=1000),
        "losses.gram.image_level": True,
        "losses.gram.anchor.period": 10_000,
        "losses.gram.anchor.first_refresh": 1_010_000,
        "losses.gram.anchor.max_refreshes": 3,
        "losses.koleo.distributed": False,
        "parallel.checkpointing": "full",
        "checkpoint.every": 1000,
    },
    "vit7b_high_res_adapt": {
        "batch_size": 8 * 256,
        "augmentation.anchor_without_distortions": True,
        "augmentation.local_crops": 8,
        "losses.dino.local_weight": Constant(value=0.5),
        "losses.gram.weight": Constant(value=1.5),
        "losses.gram.anchor.period": None,
        "losses.gram.anchor.max_refreshes": None,
        "losses.koleo.weight": Constant(value=0.1),
        "losses.koleo.distributed": True,
        "losses.koleo.group_size": 16,
        "continue_from": None,
        "loader.workers": 2,
        "parallel.checkpointing": "full",
        "checkpoint.every": 250,
        "checkpoint.keep_every": 50_000,
    },
    "vitl_im1k": {
        "batch_size": 64 * 32,
        "parallel.checkpointing": "none",
        "parallel.compile": True,
        "checkpoint.every": 3750,
    },
    "lvd1689m_distill": {
        "batch_size": 1920,
        "losses.dino.head.n_prototypes": 262_144,
        "losses.ibot.head.n_prototypes": 98_304,
        "losses.dino.local_weight": Constant(value=1.0),
        "optimizer.betas": (0.9, 0.999),
        "optimizer.clip_grad": 3.0,
        "optimizer.layerwise_decay": 0.99,
        "optimizer.patch_embed_lr_mult": 0.2,
        "augmentation.global_size": 256,
        "augmentation.horizontal_flips": False,
        "loader.workers": 2,
        "parallel.checkpointing": "full",
        "checkpoint.every": 3750,
        "checkpoint.keep_every": None,
        "students.vits.processes": 48,
        "students.vits_plus.processes": 48,
        "students.vitb.processes": 80,
        "students.vitl.processes": 120,
        "students.vitl.backbone.drop_path_rate": 0.0,
        "students.vitl.backbone.pos_embed_rope_dtype": "bf16",
    },
    "convnext_distill": {
        "batch_size": 4096,
        "augmentation.global_size": 512,
        "augmentation.local_size": 224,
        "augmentation.horizontal_flips": True,
        "losses.ibot.head.n_prototypes": 65_536,
        "optimizer.layerwise_decay": 1.0,
        "optimizer.clip_grad": 3.0,
        "parallel.checkpointing": "none",
        "students.tiny.optimizer": None,
        "students.small.optimizer": None,
        "students.large.backbone.drop_path_rate": 0.0,
    },
    "ade20k_linear": {
        "iterations": 40_000,
        "batch_size": 16,
        "optimizer.lr": OneCycle(peak=1e-3, warmup=1500, ratio=1e-6),
        "optimizer.weight_decay": Constant(value=1e-3),
        "optimizer.betas": (0.9, 0.999),
        "optimizer.clip_grad": None,
        "transform.scale": (0.5, 2.0),
        "transform.crop": 512,
        "transform.crop_max_share": 0.75,
        "transform.flip": 0.5,
        "head.layers": (-1,),
        "head.norm": True,
        "head.batchnorm": True,
        "head.class_token": False,
        "head.dropout": 0.1,
        "head.ce_weight": 1.0,
        "head.dice_weight": 0.0,
    },
    "nyu_linear": {
        "batch_size": 2 * 8,
        "iterations": 38_400,
        "optimizer.lr": OneCycle(start=3e-7, peak=3e-4, end=1.2e-8, warmup=12_800),
        "optimizer.betas": (0.9, 0.99),
        "optimizer.weight_decay": Constant(value=1e-4),
        "optimizer.clip_grad": 35.0,
        "transform.crop": 416,
        "transform.crop_width": 544,
        "transform.turn_by": 2.5,
        "transform.gamma": (0.9, 1.1),
        "transform.brightness": (0.75, 1.25),
        "transform.color": (0.9, 1.1),
        "head.bins": 256,
        "head.min_depth": 0.001,
        "head.max_depth": 10.0,
        "head.layers": (-1,),
        "head.norm": True,
        "head.batch_norm": True,
        "head.class_token": False,
        "head.sigma": 1.0,
        "head.gradient_log": 0.0,
        "head.together": 2,
        "observers.val.evaluations.nyu.least": 0.001,
        "observers.val.evaluations.nyu.most": 10.0,
        "observers.val.evaluations.nyu.crop": "nyu_eigen",
        "observers.val.evaluations.nyu.align": "none",
        "observers.val.evaluations.nyu.inference": DenseInferenceConfig(flip=True),
    },
    "nyu_dpt": {
        "evaluations.nyu.align": "scale_shift",
        "evaluations.nyu.crop": "nyu_eigen",
        "evaluations.nyu.inference": DenseInferenceConfig(resize=768, flip=True),
    },
    "ade20k_m2f": {
        "evaluations.ade20k.inference": DenseInferenceConfig(
            resize=896,
            mode="slide",
            window=896,
            stride=596,
            scales=(0.9, 0.95, 1.0, 1.05, 1.1),
            flip=True,
            batch_size=1,
        ),
    },
    "pmt_vitl": {
        "iterations": 16 * (20_210 // 16),
        "batch_size": 16,
        "optimizer.lr": Cosine(start=0.0, peak=2e-4, end=1e-9, warmup=6000),
        "optimizer.weight_decay": Constant(value=0.05),
        "optimizer.clip_grad": 0.01,
        "transform.scale": (0.5, 2.0),
        "transform.crop": 512,
        "head.queries": 100,
        "head.blocks": 6,
        "head.class_weight": 2.0,
        "head.mask_weight": 5.0,
        "head.dice_weight": 5.0,
        "head.no_object_weight": 0.1,
        "head.points": 12544,
        "head.oversample": 3.0,
        "head.importance": 0.75,
    },
    "im1k_distill": {
        "batch_size": 256,
        "students.vits.backbone.drop_path_rate": 0.1,
        "students.vits.backbone.n_storage_tokens": 0,
        "students.vitb.backbone.drop_path_rate": 0.1,
        "augmentation.global_size": 224,
    },
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = _config(name)
    for key, value in PUBLISHED[name].items():
        assert _at(config, key) == value, key


def test_the_published_resolutions() -> None:
    rows = _at(_config("vit7b_high_res_adapt"), "augmentation.resolutions")
    assert [(r.ratio, r.global_size, r.local_size, r.anchor_size) for r in rows] == [
        (0.3, 512, 112, 768),
        (0.3, 768, 112, 1152),
        (0.3, 768, 168, 1152),
        (0.05, 768, 224, 1152),
        (0.05, 768, 336, 1152),
    ]


def test_large_convnexts_have_optimizers_of_their_own() -> None:
    config: Any = _config("convnext_distill")
    own = {
        "base": {
            "lr": evolve(config.optimizer.lr, peak=1e-4),
            "weight_decay": evolve(config.optimizer.weight_decay, start=0.02),
        },
        "large": {"lr": evolve(config.optimizer.lr, peak=1e-4)},
    }
    for student, values in own.items():
        assert config.students[student].optimizer == evolve(config.optimizer, **values)


@pytest.mark.parametrize(("name", "overlay"), OVERLAID)
def test_overlays_change_hardware_and_batch_alone(name: str, overlay: str) -> None:
    base, config = _config(name), _config(name, overlay)
    gpus = int(overlay[0])
    micro_batches = gpus * config.accumulation_steps
    assert config.batch_size % micro_batches == 0
    assert config.batch_size // micro_batches == base.batch_size // (32 * base.accumulation_steps)
    same = ("batch_size", "accumulation_steps", "launcher")
    assert evolve(config, **{key: getattr(base, key) for key in same}) == base


def _config(*names: str) -> Any:
    return structure_recipe(Registry.load(), compose([FILES[name] for name in names]))


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


# --------------------------------------------------------------------------- odd paths
@pytest.mark.parametrize(
    ("key", "path", "words"),
    [
        ("output_dir", "a" * 300, "too long"),
        ("output_dir", "new/" + "a" * 300 + "/b", "too long"),
        ("output_dir", "caf\udce9", "no UTF-8"),
        ("dataset.root", "a" * 300, "too long"),
        ("dataset.root", "caf\udce9", "no UTF-8"),
        ("init_from.weights", "a" * 300, "too long"),
    ],
)
def test_paths_that_cannot_be_are_found_by_a_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    path: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["dataset.use=image_folder", "dataset.root=."] if key == "dataset.root" else []
    assert main(["quickstart", "--check", *given, f"{key}={path}"]) == ExitCode.WRONG_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- observers
def test_an_evaluation_has_the_size_of_the_global_crops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quickstart", "--output-dir", str(tmp_path / "run"), "--check"]
    for size in (28, 35):
        assert main([*words, f"augmentation.global_size={size}"]) == 0
        assert f", size {size}, " in capsys.readouterr().out


def test_what_an_observer_misses_is_known_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    missing = ("train.use=image_folder", f"train.root={tmp_path / 'nowhere'}")
    words = ["quickstart", *(f"observers.knn.evaluations.knn.{part}" for part in missing)]
    words += ["--output-dir", str(output)]
    assert main([*words, "--check"]) == ExitCode.WRONG_INPUT
    assert main(words) == ExitCode.WRONG_INPUT
    message = capsys.readouterr().err
    assert "observers.knn" in message
    assert "does not exist" in message
    assert not output.exists()
