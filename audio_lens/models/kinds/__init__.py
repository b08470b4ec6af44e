"""What families of one kind share: audio LLMs, codec language models, lone encoders."""
