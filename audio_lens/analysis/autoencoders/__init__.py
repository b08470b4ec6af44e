"""Sparse autoencoders of activations: training, what their latents are, and what they do."""

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.changing import steering
from audio_lens.analysis.autoencoders.evaluating import evaluate
from audio_lens.analysis.autoencoders.features import Feature, Features, features
from audio_lens.analysis.autoencoders.firing import Firing, clips, firings, profile, purity
from audio_lens.analysis.autoencoders.learning import found_share
from audio_lens.analysis.autoencoders.matching import match
from audio_lens.analysis.autoencoders.modality import modalities, modality_of
from audio_lens.analysis.autoencoders.published import read, write
from audio_lens.analysis.autoencoders.ranking import Ranking, rank
from audio_lens.analysis.autoencoders.splicing import splice
from audio_lens.analysis.autoencoders.steered import steer
from audio_lens.analysis.autoencoders.training import train

__all__ = [
    "Autoencoder",
    "Feature",
    "Features",
    "Firing",
    "Ranking",
    "clips",
    "evaluate",
    "features",
    "firings",
    "found_share",
    "match",
    "modalities",
    "modality_of",
    "profile",
    "purity",
    "rank",
    "read",
    "splice",
    "steer",
    "steering",
    "train",
    "write",
]
