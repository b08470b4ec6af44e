"""What a prompt and a notebook show of objects: short, with sizes, seconds and the way on."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.inputs import InputError
from audio_lens.models.mixins.shown import FOR_USERS, OF_PARTS
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.models.part import Part
from audio_lens.results import Result

QUESTION = "which digit is first?"


@pytest.fixture(scope="module")
def asked(embedded: HookedAudioTransformer):
    noise = np.random.default_rng(0).normal(size=(2, 16_000)) / 10
    return [embedded.prepare(clip, text=QUESTION, sampling_rate=16_000) for clip in noise]


@pytest.fixture(scope="module")
def swept(embedded: HookedAudioTransformer, asked):
    clean, corrupted = asked
    options = {"site": "connector.out", "axes": ["time"], "windows": 0.25}
    both = {"diff": metrics.logit_diff(" one", " two"), "prob": metrics.prob(" one")}
    return patching.sweep(embedded, clean=clean, corrupted=corrupted, metric=both, **options)


def test_inputs_say_their_sizes_and_seconds(embedded, asked) -> None:
    said = repr(asked[0])
    assert said.startswith("AudioInputs of 1 prompt: tokens 1 x ") and "1 clip of 1.00 s" in said
    two = embedded.prepare(
        [np.zeros(16_000), np.zeros(8_000)], text=[QUESTION] * 2, sampling_rate=16_000
    )
    assert "2 prompts" in repr(two) and "2 clips of 1.00, 0.50 s" in repr(two)


def test_a_timeline_says_how_far_its_positions_lie_apart(embedded, asked) -> None:
    said = repr(embedded.timeline(asked[0]))
    assert said.startswith("Timeline of 1 prompt with clips of 1.00 s: encoder 200 positions")
    assert "connector 100 positions every 0.04 s" in said and "25 of audio every 0.04 s" in said


def test_a_part_says_what_it_is(embedded) -> None:
    assert repr(embedded.part("decoder")).startswith("decoder of embedded: 6 layers of 6 heads")


def test_a_sweep_is_one_line_and_a_table(swept) -> None:
    assert repr(swept) == "SweepResult of connector.out, denoise; 2 metric x 4 time"
    one = repr(swept.of_metric("diff"))
    assert "4 time; diff; clean " in one and "corrupted " in one
    table = Cells()
    table.feed(swept._repr_html_())
    assert table.cells[:4] == ["", "effect", "recovery", "metric"]
    assert len(table.cells) == 4 * 5 and " s" in table.cells[4]


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_a_result_says_its_controls_and_counts() -> None:
    control = Result(torch.zeros(3), ("layer",), {"layer": [0, 1, 2]})
    result = Result(
        torch.tensor([0.1, float("nan"), -0.5]),
        ("layer",),
        {"layer": [0, 1, 2]},
        low=torch.zeros(3),
        high=torch.ones(3),
        controls={"random": control},
        n_kept=7,
        dropped={"alike": 2},
        meta={"title": "<b>share</b>"},
    )
    assert repr(result) == "Result of <b>share</b>; 3 layer; beside random; 7 items, 2 dropped"
    shown = result._repr_html_()
    assert "&lt;b&gt;share" in shown and "<b>" not in shown
    assert shown.index("layer 2") < shown.index("layer 0") and "layer 1" not in shown
    number = Result(torch.tensor(2.5), (), {})
    assert repr(number) == "Result of one number; 2.5"


def test_dir_is_for_users(embedded) -> None:
    listed = dir(embedded)
    assert {"run_with_cache", "generate", "encoder", "decoder", "connector", "cfg"} <= {*listed}
    assert {*listed} <= {*FOR_USERS, "encoder", "decoder", "connector"}


@pytest.mark.parametrize("name", ["W_U", "blocks", "W_Q", "ln_final"])
def test_what_is_of_a_part_says_so(embedded, name: str) -> None:
    with pytest.raises(AttributeError, match=rf'model.part\("decoder"\).{name}'):
        getattr(embedded, name)
    with pytest.raises(AttributeError, match=r"no attribute 'W_V_V'$"):
        _ = embedded.W_V_V
    assert not hasattr(embedded, "_no_such")


def test_names_of_parts_are_theirs() -> None:
    assert all(hasattr(Part, name) for name in OF_PARTS)


def test_tokens_as_strings(embedded, asked) -> None:
    assert embedded.to_str_tokens("seven two") == [" seven", " two"]
    ids = [embedded.to_single_token(word) for word in ("one", "two")]
    assert embedded.to_str_tokens(ids) == [" one", " two"]
    assert embedded.to_str_tokens(torch.tensor([ids, ids[::-1]]))[1] == [" two", " one"]
    (prompt,) = embedded.to_str_tokens(asked[0])
    assert len(prompt) == asked[0].tokens.shape[1] and "first" in "".join(prompt)
    with pytest.raises(InputError, match="no token 99999"):
        embedded.to_str_tokens([99_999])
    with pytest.raises(InputError, match="one or two axes"):
        embedded.to_str_tokens(torch.zeros(1, 1, 1, dtype=torch.long))


def test_tokens_need_a_tokenizer(model) -> None:
    with pytest.raises(TokenError, match="the words of tokens needs a tokenizer"):
        model.to_str_tokens([1])
