"""How alike activations are: CKA and RSA of layers and models, and the shape of each layer."""

from audio_lens.analysis.similarity.comparing import analyse, between, by_depth, layers, shape
from audio_lens.analysis.similarity.kernels import cka, rsa
from audio_lens.analysis.similarity.shapes import effective_rank, isotropy, mean_cosine

__all__ = [
    "analyse",
    "between",
    "by_depth",
    "cka",
    "effective_rank",
    "isotropy",
    "layers",
    "mean_cosine",
    "rsa",
    "shape",
]
