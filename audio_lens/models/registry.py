"""Which class implements which architecture: families enter themselves here, and are found here.

This is all that loading knows of the models it makes; `HookedAudioTransformer` is what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import transformers
from torch import Tensor, nn

from audio_lens.hooks import HookedRoot
from audio_lens.models.config import AudioConfig, LoadingError


class Family(HookedRoot):
    """A kind of model as loading sees it: how its config is read and its weights are named.

    A subclass that names `model_types` implements them from then on, wherever it is defined.

    Attributes:
        model_types: the Hugging Face configs (``config.model_type``) that it implements.
        hf_class: the class in transformers that it equals; of several, those it knows.
        bare_class: that class without its head, which is taken over from memory too.
        outdated_names: weights in checkpoints that are older than the class.
        weight_names: Hugging Face's names to ours, as `weights.renamed` takes them.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    hf_class: ClassVar[str | tuple[str, ...]]
    bare_class: ClassVar[str] = ""
    outdated_names: ClassVar[tuple[str, ...]] = ()
    weight_names: ClassVar[dict[str, str | None]]

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.feature_extractor: Any = None
        self.tokenizer: Any = None
        self.tokenizer_problem = ""  # why there is none, if there should be one
        self.processor: Any = None
        self.generation_config: Any = None

    def __init_subclass__(cls, beside: type[Family] | None = None, **options: Any) -> None:
        """Enter the class as what implements its `model_types`.

        Args:
            beside: the class that implements them, where this one is for another `hf_class`.
        """
        super().__init_subclass__(**options)
        if beside is not None:
            cls.model_types = beside.model_types
            _HEADS.update(dict.fromkeys(_class_names(cls), cls))
        elif "model_types" in vars(cls):
            _enter(cls)

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The configuration of a Hugging Face config.

        Raises:
            LoadingError: if it asks for something that is not implemented.
        """
        raise LoadingError(f"{cls.__name__} is put together from parts, not read as one checkpoint")

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: AudioConfig) -> Mapping[str, Tensor]:
        """Hugging Face's tensors under the names of `weight_names`: as they are, here."""
        return state

    def make_feature_extractor(self) -> Any:
        """The feature extractor that the configuration tells of."""
        return transformers.WhisperFeatureExtractor(feature_size=self.cfg.need_n_mels)

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember token ids that mean something to the model: none here."""

    def take_modules(self, hf_model: nn.Module) -> None:
        """Keep what stays a module of Hugging Face's, such as a codec: nothing, here."""


FAMILIES: dict[str, type[Family]] = {}  # by ``model_type``
_HEADS: dict[str, type[Family]] = {}  # by the Hugging Face class, those that stand beside a family
Kind = TypeVar("Kind", bound=Family)
Compose = Callable[..., Family]  # encoder, connector, decoder, merge, **options
Composing = TypeVar("Composing", bound=Compose)
_COMPOSE: list[Compose] = []


def _enter(family: type[Family]) -> None:
    """Make a class the implementation of its model types.

    Defining it anew (a notebook's cell run twice) replaces it.

    Raises:
        TypeError: if another class implements one of them.
    """
    for model_type in family.model_types:
        known = FAMILIES.get(model_type)
        if known is not None and _full_name(known) != _full_name(family):
            raise TypeError(
                f"{known.__name__} implements the model type {model_type!r} already: leave "
                f"model_types out of {family.__name__}, and call its own from_pretrained or from_hf"
            )
        FAMILIES[model_type] = family


def _class_names(family: type[Family]) -> tuple[str, ...]:
    """The Hugging Face classes that a family equals; none where it names none."""
    names = getattr(family, "hf_class", ())
    return (names,) if isinstance(names, str) else tuple(names)


def classes_of(model_type: str) -> tuple[str, ...]:
    """The Hugging Face classes of a model type that can be read, heads that stand beside it too."""
    family = FAMILIES[model_type]
    beside = (name for name, head in _HEADS.items() if model_type in head.model_types)
    return (*_class_names(family), *beside)


def _full_name(family: type) -> str:
    return f"{family.__module__}.{family.__qualname__}"


def supported() -> str:
    """The model types that are implemented, in words."""
    return ", ".join(sorted(FAMILIES))


def family_of(hf_config: Any, kind: type[Kind] = Family) -> type[Kind]:
    """The family that implements a Hugging Face config.

    Args:
        kind: what is wanted: any family, or one class and its subclasses.

    Raises:
        LoadingError: if none does (the message lists those that exist), or one of another kind.
    """
    if hf_config.model_type not in FAMILIES:
        raise LoadingError(
            f"architecture {hf_config.model_type!r} is not supported; supported: {supported()}"
        )
    named = (_HEADS.get(name) for name in hf_config.architectures or ())
    family = next(filter(None, named), FAMILIES[hf_config.model_type])
    if issubclass(family, kind):
        return family
    if issubclass(kind, family):  # a subclass of one's own, asked for by itself
        return kind
    raise LoadingError(
        f"this is a {hf_config.model_type}, which {family.__name__} implements, not "
        f"{kind.__name__}: call HookedAudioTransformer's method, which finds the class"
    )


def composes(compose: Composing) -> Composing:
    """Make a function the one that puts models together from parts."""
    _COMPOSE.append(compose)
    return compose


def compose(*parts: Any, **options: Any) -> Family:
    """A model put together from parts, by the function that entered itself for it."""
    return _COMPOSE[-1](*parts, **options)
