"""Faults caused for real, and what a run lost by them.

Small runs on this machine's CPU are killed, signaled, starved of disk and memory, fed with damaged
and with foreign files, and started again. *Survived* means that the run, started again by the same
command, ended with the export and the metrics of one that was never disturbed, bit for bit; or that
it was refused, or ended by itself in the given time, with the exit code that the documentation says
and one clear complaint. Linux only; some faults need the right to mount, or to be root.

    python benchmarks/faults [--kills 10] [--only WORD]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import folders
import inputs
import ranks
import stops
from harness import Outcome, Place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how often a run is killed")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    options = parser.parse_args()
    every = [*stops.faults(options.kills), *ranks.FAULTS, *folders.FAULTS, *inputs.FAULTS]
    print("| fault | injected by | survived | lost |")
    print("|---|---|---|---|")
    failed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for number, fault in enumerate(every):
            if options.only not in fault.name:
                continue
            place = Place(Path(scratch, f"fault{number}"), Path(scratch, "shared"))
            outcomes = []
            try:
                outcomes.extend(fault.cause(place))
            except Exception as error:  # the others are to be caused all the same
                outcomes.append(Outcome(False, f"{type(error).__name__}: {error}"[:100]))
            good = sum(outcome.survived for outcome in outcomes)
            failed += len(outcomes) - good
            shown = [o.lost for o in outcomes if not o.survived] or [
                o.lost for o in outcomes if o.lost != "nothing"
            ]
            lost = "; ".join(dict.fromkeys(shown)) or "nothing"
            if not outcomes:
                lost = "could not be caused here"
            print(
                f"| {fault.name} | {fault.how} | {good} of {len(outcomes)} | {lost} |", flush=True
            )
    print(f"\n{time.monotonic() - began:,.0f} s", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
