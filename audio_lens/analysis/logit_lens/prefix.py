"""Forced prefixes: the model's turn begun for it, so that the next token is the attribute."""

from __future__ import annotations

from audio_lens.inputs import InputError
from audio_lens.items import Items
from audio_lens.models import HookedAudioTransformer


def prefixed(model: HookedAudioTransformer, items: Items, prefix: str) -> Items:
    """The items with the model's turn begun: "The speaker's gender is", and the answer comes next.

    Of a model that answers questions, the text becomes the whole prompt with the prefix behind it;
    of one that transcribes, what it has written so far.

    Args:
        model: whose prompts they become.
        items: with their questions.
        prefix: what the model's turn begins with.

    Raises:
        InputError: an empty prefix, or a model whose prompts cannot be begun by text.
    """
    if not prefix.strip():
        raise InputError("a prefix needs some text")
    begun: dict[str | None, str] = {}
    made = []
    for item in items:
        if item.text not in begun:
            begun[item.text] = _begun(model, items.of([item]), prefix)
        made.append(item.replaced(text=begun[item.text]))
    return Items.of(made)


def _begun(model: HookedAudioTransformer, item: Items, prefix: str) -> str:
    """The text of a prompt with the prefix behind it; checked on the item that it is of."""
    plain = item.prepare(model)
    prompt = plain.text[0] if plain.text else None
    text = (prompt if isinstance(prompt, str) else item[0].text or "") + prefix
    longer = item.of([item[0].replaced(text=text)]).prepare(model)
    count = plain.tokens.shape[1]
    if longer.tokens.shape[1] <= count or not longer.tokens[:, :count].equal(plain.tokens):
        raise InputError(
            f"the prompts of {model.cfg.model_name} cannot be begun with {prefix!r}: the prompt in "
            "front of it becomes another one"
        )
    return text
