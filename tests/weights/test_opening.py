"""Weights by path, run folder and published name; and sharded checkpoints, ours and torch's own."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from dinov3_framework import WEB_IMAGES, CheckpointError, Registry, load_backbone
from dinov3_framework.checkpoints.manifest import FileRecord, Manifest
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.cli import main
from dinov3_framework.weights.cli import main as weights_main
from dinov3_framework.weights.convert import convert_backbone
from dinov3_framework.weights.sharded import open_checkpoint

VIT: dict[str, Any] = {"patch_size": 7, "embed_dim": 96, "depth": 4, "num_heads": 3}
VIT |= {"ffn_ratio": 2.0, "in_chans": 1}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, with checkpoints of both and an export."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    recipe.write_text(
        'extends = ["dinov3_recipes:quickstart"]\n'
        'drop = ["observers.knn", "observers.figures"]\n'
        "iterations = 2\nbatch_size = 4\noptimizer.lr.warmup = 1\nloader.workers = 0\n"
        'checkpoint.every = 1\nteacher.momentum = 0.5\nparallel.device = "cpu"\n'
    )
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main([str(recipe), "--output-dir", str(output)]) == 0
    return output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def same(first: Any, second: Any) -> bool:
    ours, theirs = first.backbone.state_dict(), second.backbone.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_is_its_exported_teacher(run: Path, registry: Registry) -> None:
    exported = load_backbone(run / "exports/teacher_backbone.safetensors", registry=registry)
    assert same(load_backbone(run, registry=registry), exported)


def test_without_an_export_it_is_the_newest_checkpoint(copied: Path, registry: Registry) -> None:
    exported = load_backbone(copied, registry=registry)
    (copied / "exports/teacher_backbone.safetensors").unlink()
    for path in (copied, copied / "checkpoints", copied / "checkpoints/step_00000002"):
        loaded = load_backbone(path, registry=registry)
        assert same(loaded, exported)
        assert (loaded.images, loaded.size) == (exported.images, 28)
        assert loaded.component == "vit"
        assert loaded.provenance["checkpoint"] == "step_00000002"
    older = load_backbone(copied / "checkpoints/step_00000001", registry=registry)
    assert not same(older, exported)


def test_the_student_is_there_too(run: Path, registry: Registry) -> None:
    tensors, _ = CheckpointStore(run / "checkpoints").read("student.backbone.")
    student = load_backbone(run, network="student", registry=registry).backbone.state_dict()
    assert {f"student.backbone.{k}" for k in student} == tensors.keys()
    assert all(torch.equal(tensors[f"student.backbone.{k}"], v) for k, v in student.items())


def test_a_checkpoint_without_its_recipe_is_recognized(copied: Path, registry: Registry) -> None:
    exported = load_backbone(copied, registry=registry)
    alone = copied.parent / "alone"
    (copied / "checkpoints/step_00000002").rename(alone)
    with pytest.raises(CheckpointError, match="takes 1 channels, and nothing says how"):
        load_backbone(alone, registry=registry)
    loaded = load_backbone(alone, images=exported.images, registry=registry)
    assert same(loaded, exported)


def test_damaged_checkpoints_are_passed_over(
    copied: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "exports/teacher_backbone.safetensors").unlink()
    first = load_backbone(copied / "checkpoints/step_00000001", registry=registry)
    (shard,) = (copied / "checkpoints/step_00000002").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert same(load_backbone(copied, registry=registry), first)
    assert "bytes were altered" in caplog.text
    with pytest.raises(CheckpointError, match="bytes were altered"):
        load_backbone(copied / "checkpoints/step_00000002", registry=registry)
    (copied / "checkpoints/step_00000001/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        load_backbone(copied, registry=registry)


# --------------------------------------------------------------------------- torch's own
def test_sharded_checkpoints_of_others(tmp_path: Path, registry: Registry) -> None:
    values = VIT | {"in_chans": 3}
    networks = {n: registry.build("backbone", "vit", **values) for n in ("teacher", "student")}
    model = {f"{n}.backbone": backbone.state_dict() for n, backbone in networks.items()}
    model["teacher.dino_head"] = {"mlp.0.weight": torch.ones(3)}
    content = {"model": model, "iteration": 7, "optimizer": {"state": {"lr": 0.1}}}
    dcp.save(content, checkpoint_id=tmp_path / "12499")
    for network, backbone in networks.items():
        loaded = load_backbone(
            tmp_path / "12499", network=network, images=WEB_IMAGES, registry=registry
        )
        state = loaded.backbone.state_dict()
        assert all(torch.equal(state[k], v) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        (("teacher", "model_ema"), "model_ema"),
        (("teacher", "model_ema", "gram_teacher"), "model_ema"),
        (("teacher", "gram_teacher"), "teacher"),
    ],
)
def test_of_several_averages_the_students_is_taken_aloud(
    tmp_path: Path,
    registry: Registry,
    caplog: pytest.LogCaptureFixture,
    others: tuple[str, ...],
    taken: str,
) -> None:
    """As the reference leaves them, where ``model_ema`` is the teacher, or what learns from it."""
    values = VIT | {"in_chans": 3}
    networks = {n: registry.build("backbone", "vit", **values) for n in (*others, "student")}
    for number, backbone in enumerate(networks.values()):
        nn.init.constant_(backbone.cls_token, number + 1.0)
    model = {f"{n}.backbone": backbone.state_dict() for n, backbone in networks.items()}
    for step in ("99", "1249"):  # the newest counts, and 99 is not the last by its letters
        dcp.save({"model": model, "iteration": int(step)}, checkpoint_id=tmp_path / "ckpt" / step)
    loaded = load_backbone(tmp_path / "ckpt", images=WEB_IMAGES, registry=registry)
    assert torch.equal(loaded.backbone.cls_token, networks[taken].cls_token)
    assert f"taking 'model.{taken}.backbone', not" in caplog.text
    assert loaded.provenance["file"] == "1249"
    for name, backbone in networks.items():
        if name != "teacher":
            found = load_backbone(
                tmp_path / "ckpt", network=name, images=WEB_IMAGES, registry=registry
            )
            assert torch.equal(found.backbone.cls_token, backbone.cls_token)


def test_classifiers_and_averages_give_their_backbone_aloud(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """As timm's trainer and torch's SWA leave them."""
    backbone = registry.build("backbone", "vit", **VIT | {"in_chans": 3})
    head = {"head.weight": torch.ones(10, 32), "head.bias": torch.ones(10)}
    classifier = dict(backbone.state_dict()) | head
    torch.save({"epoch": 3, "state_dict": classifier}, tmp_path / "model_best.pth.tar")
    ema = classifier | {"cls_token": backbone.cls_token.detach() + 1}
    torch.save({"state_dict": classifier, "state_dict_ema": ema}, tmp_path / "ema.pth.tar")
    torch.save(torch.optim.swa_utils.AveragedModel(backbone).state_dict(), tmp_path / "swa.pth")
    for name, change, said in (
        ("model_best.pth.tar", 0, "left out: head.bias, head.weight"),
        ("ema.pth.tar", 1, "taking 'state_dict_ema', not 'state_dict'"),
        ("swa.pth", 0, "n_averaged"),
    ):
        caplog.clear()
        loaded = load_backbone(tmp_path / name, images=WEB_IMAGES, registry=registry)
        assert torch.equal(loaded.backbone.cls_token, backbone.cls_token + change)
        assert said in caplog.text


@pytest.mark.parametrize("format", ["meta", "huggingface"])
def test_a_mask_token_may_be_missing_aloud(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    """As in exports for inference; no other tensor may."""
    backbone = registry.build("backbone", "vit", **VIT | {"in_chans": 3})
    nn.init.ones_(backbone.mask_token)
    expected = {k: t.bfloat16() for k, t in backbone.state_dict().items()}
    torch.save(expected, tmp_path / "whole.pth")
    whole = load_backbone(tmp_path / "whole.pth", images=WEB_IMAGES, registry=registry)
    source, file, prefix = tmp_path / "x.pth", tmp_path / "x.pth", ""
    if format == "huggingface":
        source, file, prefix = tmp_path / "hf", tmp_path / "hf/model.safetensors", "embeddings."
        convert_backbone(
            tmp_path / "whole.pth", source, format, images=WEB_IMAGES, registry=registry
        )
    state = load_file(file) if format == "huggingface" else expected
    without = {k: t for k, t in state.items() if k != f"{prefix}mask_token"}

    def write(tensors: dict[str, Any]) -> None:
        save_file(tensors, file) if format == "huggingface" else torch.save(tensors, file)

    write(without)
    loaded = load_backbone(source, images=WEB_IMAGES, registry=registry)
    assert "mask_token; masked training begins with a new one" in caplog.text
    ours, theirs = (dict(each.backbone.named_parameters()) for each in (loaded, whole))
    assert ours["mask_token"].dtype == torch.bfloat16
    assert not ours.pop("mask_token").any()
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items())
    write({k: t for k, t in without.items() if k != f"{prefix}cls_token"})
    with pytest.raises(CheckpointError):
        load_backbone(source, images=WEB_IMAGES, registry=registry)


def test_tensors_may_be_left_over_by_name(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint of the error is accepted as it is, wherever weights are read."""
    state = dict(registry.build("backbone", "vit_small").state_dict())
    odd = {"probe[0].weight": torch.ones(2), "probe[0].bias": torch.ones(2), "it's*": torch.ones(1)}
    path = tmp_path / "x.pth"
    torch.save(state | odd | {"blocks.0.extra": torch.ones(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(path, registry=registry)
    text = str(caught.value)
    (hint,) = (line.strip() for line in text.splitlines() if "unused =" in line)
    flags = shlex.split(text.partition("(--")[2].partition("):")[0])
    given: dict[str, Any] = {}
    exec(hint, given)
    loaded = load_backbone(path, unused=given["unused"], registry=registry)
    assert torch.equal(loaded.backbone.cls_token, state["cls_token"])
    with pytest.raises(CheckpointError, match=r"1 in the file.*\n.*it's\*"):
        load_backbone(path, unused=["probe*", "blocks.0.extra"], registry=registry)

    flags[0] = f"--{flags[0]}"
    assert weights_main(["show", str(path)]) == 2
    assert weights_main(["show", str(path), *flags]) == 0
    assert weights_main(["convert", str(path), str(tmp_path / "y.safetensors"), *flags]) == 0
    assert weights_main(["show", str(tmp_path / "y.safetensors")]) == 0

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'extends = ["dinov3_recipes:knn"]\nweights = "{path}"\n')
    assert main([str(recipe), "--check"]) == 2
    recipe.write_text(f"{recipe.read_text()}{hint}\n")
    capsys.readouterr()
    assert main([str(recipe), "--check"]) == 0, capsys.readouterr().err


def test_networks_of_lightning_are_known_by_their_names(tmp_path: Path, registry: Registry) -> None:
    values = VIT | {"in_chans": 3}
    networks = {n: registry.build("backbone", "vit", **values) for n in ("teacher", "student")}
    nn.init.ones_(networks["student"].cls_token)
    state = {f"{n}_backbone.{k}": v for n, b in networks.items() for k, v in b.state_dict().items()}
    torch.save({"epoch": 9, "state_dict": state}, tmp_path / "last.ckpt")
    for name, backbone in networks.items():
        found = load_backbone(
            tmp_path / "last.ckpt", network=name, images=WEB_IMAGES, registry=registry
        )
        assert torch.equal(found.backbone.cls_token, backbone.cls_token)


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_others_checkpoints_is_run(tmp_path: Path, registry: Registry) -> None:
    sprung = tmp_path / "sprung"
    folder = tmp_path / "12499"
    backbone = registry.build("backbone", "vit", **VIT | {"in_chans": 3})
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    # As an item beside the tensors it is never read ...
    dcp.save(state | {"trap": Trap(sprung)}, checkpoint_id=folder)
    load_backbone(folder, images=WEB_IMAGES, registry=registry)
    assert not sprung.exists()
    # ... and the index is not unpickled where it asks for such a thing.
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match="refused"):
        load_backbone(folder, images=WEB_IMAGES, registry=registry)
    assert not sprung.exists()


def test_shards_that_are_links_out_of_their_folder(
    copied: Path, tmp_path: Path, registry: Registry
) -> None:
    ours, theirs = copied / "checkpoints/step_00000002", tmp_path / "theirs"
    backbone = registry.build("backbone", "vit", **VIT | {"in_chans": 3})
    dcp.save(
        {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()},
        checkpoint_id=theirs,
    )
    for folder in (ours, theirs):
        (shard,) = folder.glob("*.distcp")
        shard.symlink_to(shard.rename(tmp_path / f"{folder.name}.away"))
        with pytest.raises(CheckpointError, match=rf"{shard.name}.*link that leads out"):
            load_backbone(folder, images=WEB_IMAGES, registry=registry)


def test_a_sharded_tensor_that_declares_too_much(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "v": torch.ones(3)}, checkpoint_id=tmp_path / "12499")
    index = tmp_path / "12499/.metadata"
    content = pickle.loads(index.read_bytes())
    content.state_dict_metadata["w"].size = torch.Size([10**13])
    index.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="'w' is said to be larger than what is stored"):
        open_checkpoint(tmp_path / "12499")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000, b'{"backbone": [1]}'])
def test_a_state_that_is_no_table_though_its_hash_is_right(tmp_path: Path, content: bytes) -> None:
    path = CheckpointStore(tmp_path).save(1, {"w": torch.ones(3)}, {})
    files = dict(Manifest.read(path).files)
    for name in ("state.json", "manifest.json", "COMPLETE"):
        (path / name).unlink()
    (path / "state.json").write_bytes(content)
    Manifest(1, {**files, "state.json": FileRecord.of(path / "state.json")}).write(path)
    with pytest.raises(CheckpointError, match=r"step_00000001 is damaged: state\.json: "):
        open_checkpoint(path)


@pytest.mark.parametrize("form", ["folder", "file", "beside the base"])
def test_an_adapter_is_named(
    tmp_path: Path, registry: Registry, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As PEFT saves it, and as a state dict of what it wraps."""
    state = dict(registry.build("backbone", "vit_small").state_dict())
    path, name = tmp_path, "base_model.model.blocks.0.attn.qkv"
    lora = {f"{name}.lora_A.weight": torch.ones(4, 384), f"{name}.lora_B.weight": torch.ones(9, 4)}
    if form == "file":
        path = tmp_path / "last.pth"
        base = {f"base_model.model.{k}": t for k, t in state.items()}
        base[f"{name}.base_layer.weight"] = base.pop(f"{name}.weight")
        torch.save({"model": base | lora}, path)
    else:
        save_file(lora, tmp_path / "adapter_model.safetensors")
        config = '{"peft_type": "LORA", "base_model_name_or_path": "facebook/some-base"}'
        (tmp_path / "adapter_config.json").write_text(config)
    if form == "beside the base":
        save_file(state, tmp_path / "model.safetensors")
        load_backbone(tmp_path, registry=registry)
        assert "adapter beside its weights" in caplog.text
        return
    with pytest.raises(CheckpointError, match=r"LoRA adapter .*merge it") as caught:
        load_backbone(path, registry=registry)
    assert len(str(caught.value).splitlines()) == 1
    assert ("facebook/some-base" in str(caught.value)) == (form == "folder")


# --------------------------------------------------------------------------- names
def test_published_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    state = registry.build("backbone", "vit_small").state_dict()
    torch.save(state, cache / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    for name in ("dinov3_vits16", "dinov3_vits16@LVD1689M"):
        loaded = load_backbone(name, registry=registry)
        assert torch.equal(loaded.backbone.norm.bias, state["norm.bias"])  # type: ignore[union-attr]
        assert (loaded.component, loaded.images) == ("vit_small", WEB_IMAGES)
    with pytest.raises(CheckpointError, match=r"not published with weights of 'SAT493M'"):
        load_backbone("dinov3_vits16@SAT493M", registry=registry)
    with pytest.raises(CheckpointError, match=r"no file dinov3_vit16, nor .* dinov3_vits16"):
        load_backbone("dinov3_vit16", registry=registry)


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_models_of_the_hub_are_named(
    tmp_path: Path,
    registry: Registry,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("facebook/dinov3-vits16-pretrain-lvd1689m", "timm/vit_small_patch16_dinov3.x"):
        advice = f"hf download {model} --local-dir {model.partition('/')[2]}"
        with pytest.raises(CheckpointError, match=f"Hugging Face hub.*{advice}") as caught:
            load_backbone(f"{prefix}{model}", registry=registry)
        assert len(str(caught.value).splitlines()) == 1
        assert main(["knn", f'weights="{prefix}{model}"', "--check"]) == 2
        assert advice in capsys.readouterr().err
    (tmp_path / "facebook").mkdir()
    with pytest.raises(CheckpointError, match="published names"):
        load_backbone("facebook/dinov3-vits16", registry=registry)
    state = registry.build("backbone", "vit_small").state_dict()
    torch.save(state, tmp_path / "facebook/dinov3-vits16")
    load_backbone("facebook/dinov3-vits16", registry=registry)


def test_recipes_take_published_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    state = Registry.load().build("backbone", "vit_small").state_dict()
    torch.save(state, cache / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    assert main(["knn", "weights=dinov3_vits16", "--check"]) == 0
    assert "21,601,152" in capsys.readouterr().out
    assert main(["knn", "weights=dinov3_vits61", "--check"]) == 2
    assert "published names: dinov3_convnext_base" in capsys.readouterr().err


# ------------------------------------------------------------------ one way to name a model
def test_a_step_of_a_run(run: Path, registry: Registry, tmp_path: Path) -> None:
    named = load_backbone(f"{run}@1", registry=registry)
    assert same(named, load_backbone(run / "checkpoints" / "step_00000001", registry=registry))
    assert not same(named, load_backbone(run, registry=registry))
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; it has 1, 2"):
        load_backbone(f"{run}@7", registry=registry)


def test_a_model_of_the_hub_that_was_downloaded(
    run: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``hf download`` leaves it: a snapshot of links to blobs, shards among them."""
    source = load_backbone(run, registry=registry)
    state, images = source.backbone.state_dict(), source.images
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--dinov3"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    snapshot = model / "snapshots" / "abc123"
    (model / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    whole = tmp_path / "whole"
    convert_backbone(run, whole, "huggingface", registry=registry)
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, model / "blobs" / f"of-{file}")
    (model / "blobs" / "index").write_text(json.dumps(index))
    shutil.copy(whole / "config.json", model / "blobs" / "config")
    files = {file: f"of-{file}" for file in halves}
    files |= {"model.safetensors.index.json": "index", "config.json": "config"}
    for name, blob in files.items():
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    found = load_backbone("some/dinov3", images=images, registry=registry)
    assert torch.equal(found.backbone.state_dict()["cls_token"], state["cls_token"])
    (snapshot / "model-1.safetensors").unlink()
    (snapshot / "model-1.safetensors").symlink_to(whole / "model.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load_backbone("some/dinov3", images=images, registry=registry)


def test_a_backbone_without_weights_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knn", "weights=vit_small", "--check", "--output-dir", str(tmp_path)]) == 0
    assert "random, seed 0" in capsys.readouterr().out
