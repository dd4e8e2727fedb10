#!/usr/bin/env bash
# What webdataset makes of a shard that GNU tar packed from a folder where two samples share an image
# by a hard link, as tools that remove duplicates leave them.
#
# Guess:    two samples with an image each, as in the folder.
# Seen:     webdataset 1.0.2: the second sample has its label and no image, without a word. tar stores
#           the second of two hard links as a link to the first, without its bytes, and members that
#           are no plain files are passed over. tar --hard-dereference avoids it.
# Output:   as it is: a has cls, jpg; b has cls
#           --hard-dereference: a has cls, jpg; b has cls, jpg
#
# Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet webdataset==1.0.2 numpy==2.4.6
mkdir "$folder/samples" && cd "$folder/samples"
printf 'the bytes of an image' > a.jpg
ln a.jpg b.jpg
printf 0 > a.cls
printf 1 > b.cls
tar --sort=name -cf ../linked.tar -- *
tar --sort=name --hard-dereference -cf ../whole.tar -- *
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' | tee "$folder/seen"
import webdataset

for name, shard in (("as it is", "linked.tar"), ("--hard-dereference", "whole.tar")):
    samples = webdataset.WebDataset(shard, shardshuffle=False)
    fields = [
        f"{each['__key__']} has {', '.join(sorted(k for k in each if k[0] != '_'))}"
        for each in samples
    ]
    print(f"{name}: {'; '.join(fields)}")
PYTHON
diff "$folder/seen" - <<'SEEN'
as it is: a has cls, jpg; b has cls
--hard-dereference: a has cls, jpg; b has cls, jpg
SEEN
