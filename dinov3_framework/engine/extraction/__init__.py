"""Features of whole datasets as files: the task, and what it shares with loaded backbones."""
