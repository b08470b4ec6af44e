"""The former name of `audio_lens.provenance`."""

from audio_lens.provenance import provenance, versions, weights_hash

__all__ = ["provenance", "versions", "weights_hash"]
