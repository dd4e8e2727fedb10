"""The engine: everything between a checked recipe and its results; and the tasks it offers."""
