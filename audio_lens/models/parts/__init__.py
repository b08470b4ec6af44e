"""Whole parts that families put together: language models, connectors, codecs, stacks."""
