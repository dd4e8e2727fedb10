"""Time and memory of reading the index of a checkpoint of many shards, safely and by torch.

The index is that of a network of ``--tensors`` tensors, each split over ``--ranks`` processes, with
what AdamW keeps of them left out. Each reading happens in a process of its own; torch's unpickles
whatever the file asks for, which is why the framework has one that does not.

    python benchmarks/index_reading.py [--tensors 2400] [--ranks 256] [--rounds 3]
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

_READ = """
import resource, sys, time
from pathlib import Path
from torch.distributed.checkpoint import FileSystemReader
from dinov3_framework.checkpoints.index_reader import read_index
folder, names = Path(sys.argv[1]), [f"__{rank}_0.distcp" for rank in range(int(sys.argv[2]))]
before = time.process_time()
if sys.argv[3] == "ours":
    index = read_index(folder / ".metadata", set(names))
else:
    index = FileSystemReader(folder).read_metadata()
assert len(index.storage_data) == int(sys.argv[4])
print(time.process_time() - before)
"""


def write(folder: Path, tensors: int, ranks: int) -> int:
    """Write the index alone; its bytes."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries, places = {}, {}
    for number in range(tensors):
        name, rows = f"student.backbone.blocks.{number}.weight", 4
        chunks = [
            ChunkStorageMetadata(torch.Size([rank * rows, 0]), torch.Size([rows, 8]))
            for rank in range(ranks)
        ]
        size = torch.Size([rows * ranks, 8])
        entries[name] = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
        for rank, chunk in enumerate(chunks):
            place = MetadataIndex(name, chunk.offsets, rank)
            places[place] = _StorageInfo(f"__{rank}_0.distcp", number * 512, 512)
    content = pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=places))
    (folder / ".metadata").write_bytes(content)
    return len(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=2400)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shards = options.tensors * options.ranks
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.tensors, options.ranks)
        print(f"{shards:,} shards, {size / 1e6:.0f} MB\n")
        print("| reader | processor seconds | MiB at most |")
        print("|---|---|---|")
        for reader in ("ours", "torch") * options.rounds:
            words = [folder, str(options.ranks), reader, str(shards)]
            # A process of its own between, so that the peak of children is that of one reading.
            measure = f"import resource, subprocess, sys; {_CHILD}"
            line = [sys.executable, "-c", measure, sys.executable, "-c", _READ, *words]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            seconds, peak = done.stdout.split()
            print(f"| {reader} | {float(seconds):.1f} | {int(peak) / 1024:,.0f} |", flush=True)


_CHILD = (
    "print(subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True).stdout.strip(),"
    " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)

if __name__ == "__main__":
    main()
