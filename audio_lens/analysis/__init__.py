"""What is asked of a model beside patching: where it attends, what it would write, when it listens.

Everything here computes and returns; `audio_lens.report` shows it.
"""
