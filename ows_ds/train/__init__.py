"""The training run: context, loop, loss, log, resume, export."""
