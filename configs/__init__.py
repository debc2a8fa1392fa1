"""Ready-made configurations; the first line of each file is the command that runs it."""
