#!/usr/bin/env bash
# torch.onnx.export writes Python's // of sizes as a division that rounds towards zero.
#
# Guess:    an exported model computes shapes as the module does, so that the usual ceiling
#           -(-side // 4) gives as many cells in onnxruntime as in torch.
# Seen:     torch 2.14.1, onnxscript 0.7.2, onnxruntime 1.32.0: the exporter turns operator.floordiv
#           into ONNX's Div, which rounds integers towards 0. -(-10 // 4) is 3 in torch and 2 in the
#           file, without a warning; sides that divide evenly agree, and (side + 3) // 4 always does.
#           A model that pads or crops by such a number is wrong at some sizes alone.
# Output:   side 8: torch 2, file 2
#           side 9: torch 3, file 2
#           side 10: torch 3, file 2
#           side 12: torch 3, file 3
#
# Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 \
    onnxruntime==1.32.0 numpy
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import onnxruntime
import torch


class Cells(torch.nn.Module):
    def forward(self, rows):
        return rows.new_zeros(-(-rows.shape[0] // 4))


free = {0: torch.export.Dim("side")}
torch.onnx.export(
    Cells(), (torch.zeros(10),), "cells.onnx", dynamo=True, dynamic_shapes=(free,), verbose=False
)
session = onnxruntime.InferenceSession("cells.onnx")
name = session.get_inputs()[0].name
for side in (8, 9, 10, 12):
    rows = torch.zeros(side)
    (found,) = session.run(None, {name: rows.numpy()})
    print(f"side {side}: torch {len(Cells()(rows))}, file {len(found)}", flush=True)
PYTHON
diff "$folder/seen" - <<'SEEN'
side 8: torch 2, file 2
side 9: torch 3, file 2
side 10: torch 3, file 2
side 12: torch 3, file 3
SEEN
