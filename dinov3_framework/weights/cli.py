"""``dinov3-weights``: show what a file of weights holds, and write it in another format."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov3_framework import __version__
from dinov3_framework.errors import ExitCode, UserError, escape_unencodable, printable

if TYPE_CHECKING:
    from dinov3_framework.weights.loaded import LoadedBackbone

_EPILOG = """\
SOURCE is a file or folder of any known format, a run's output folder, a URL, or a published name.
The list has the published names, and the formats to convert to.

  dinov3-weights show dinov3_vits16_pretrain_lvd1689m-08c60483.pth
  dinov3-weights convert runs/quickstart teacher.pth
  dinov3-weights convert teacher.pth vits16-hf --to huggingface
  dinov3-weights convert teacher.pth segmenter.onnx --head runs/segmenter
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(argv)
    escape_unencodable()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        {"show": _show, "convert": _convert, "list": _list}[options.verb](options)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that went away (``| head``) is no mistake
        # Python flushes once more at exit; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        print(printable(str(error)), file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov3-weights",
        description="Show and convert weights of backbones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dinov3-framework {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show | convert | list")
    show = verbs.add_parser("show", help="say what weights are, and whether they are whole")
    convert = verbs.add_parser("convert", help="write weights in another format")
    verbs.add_parser("list", help="list the published weights, and the formats to write")
    for verb in (show, convert):
        verb.add_argument("source", help="file, folder, URL or published name")
        verb.add_argument(
            "--network",
            metavar="NAME",
            default="teacher",
            help="which network of a training checkpoint: teacher (the default), student, or "
            "another by its name there",
        )
        verb.add_argument(
            "--images",
            choices=("web", "satellite"),
            help="what the weights were trained on, where they do not say so",
        )
        verb.add_argument(
            "--unused",
            metavar="PATTERN",
            action="append",
            default=[],
            help="tensors that may be left over, by name or pattern with *; may be repeated",
        )
    convert.add_argument("target", help="file or folder to write")
    convert.add_argument("--to", metavar="FORMAT", help="format; left out, as the suffix says")
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of the parameters")
    convert.add_argument(
        "--head",
        metavar="HEAD",
        help="a head trained on the backbone, its file or the run's folder: what is written gives "
        "its predictions (onnx)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """How the source is to be read."""
    from dinov3_framework.configs import SATELLITE_IMAGES, WEB_IMAGES

    images = {None: None, "web": WEB_IMAGES, "satellite": SATELLITE_IMAGES}[options.images]
    return {"network": options.network, "images": images, "unused": options.unused}


def _show(options: argparse.Namespace) -> None:
    from dinov3_framework.weights.loading import load_backbone

    # Loaded in full: only then is it known that nothing is missing, cut off or not finite.
    loaded = load_backbone(options.source, **_reading(options))
    for label, value in (*_rows(loaded), *_run_rows(Path(options.source))):
        print(printable(f"{label:<12} {value}"))


def _rows(loaded: LoadedBackbone) -> list[tuple[str, str]]:
    backbone, images = loaded.backbone, loaded.images
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in backbone.parameters()})
    return [
        ("backbone", f"{loaded.component}, {parameters:,} parameters, {', '.join(types)}"),
        ("features", f"{backbone.embed_dim} wide, a patch every {backbone.patch_size} px"),
        ("layers", str(backbone.n_layers)),
        ("images", f"{images.channels} channels, {loaded.size} px"),
        ("mean", ", ".join(f"{value:g}" for value in images.mean)),
        ("std", ", ".join(f"{value:g}" for value in images.std)),
        *sorted(loaded.provenance.items()),
    ]


def _run_rows(source: Path) -> Iterator[tuple[str, str]]:
    """Where and how the run was started whose folder or export this is.

    Not in the export itself: that may be given away, and is the same bytes wherever it was made.
    A copy of its own lies beside it.
    """
    from dinov3_framework.runtime.environment import starts_of

    starts = starts_of(source) or starts_of(source.absolute().parent)
    for start in starts[-1:]:
        yield "host", str(start.get("host"))
        yield "command", shlex.join(map(str, start.get("command", ())))


def _convert(options: argparse.Namespace) -> None:
    import torch

    from dinov3_framework.weights.convert import convert_backbone

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}
    done = convert_backbone(
        options.source,
        options.target,
        options.to,
        **_reading(options),
        dtype=dtypes[options.dtype],
        head=options.head,
        overwrite=options.overwrite,
    )
    print(
        f"{done.path}: {done.component}, {done.parameters:,} parameters, from {done.source_format} "
        f"to {done.format}; {done.compared}"
    )
    for tensor in done.lost:
        print(f"  without {tensor}")


def _list(options: argparse.Namespace) -> None:
    from dinov3_framework.registry import Registry
    from dinov3_framework.weights import formats

    registry = Registry.load()
    for name, published in sorted(registry.published.items()):
        for training_set, file in published.files.items():
            print(f"{name:<24} {training_set:<10} {file.file}")
    print(f"formats: {', '.join(formats(registry))}")
