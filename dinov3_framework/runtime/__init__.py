"""One process of a run: process group, agreement between ranks, output folder, console."""
