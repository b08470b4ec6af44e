"""The shipped table of families: complete, within the tolerances, and shown by docs and command."""

from pathlib import Path

from typer.testing import CliRunner

from audio_lens.catalogue import Catalogue
from audio_lens.cli import app
from families import FAMILIES

README = Path(__file__).parents[2] / "README.md"


def test_every_family_is_in_it_and_equal_to_hugging_face() -> None:
    catalogue = Catalogue.load()
    assert [entry.name for entry in catalogue.entries] == list(FAMILIES)
    assert all(0 <= entry.float64 <= 1e-12 for entry in catalogue.entries)
    assert all(0 <= entry.float32 <= 1e-5 for entry in catalogue.entries)


def test_what_float64_leaves_out_is_said() -> None:
    """Every batch that is not measured in float64 is named with its difference, or as NaN."""
    catalogue = Catalogue.load()
    for entry in catalogue.entries:
        assert list(entry.not_float64) == list(FAMILIES[entry.name].no_float64), entry.name
        assert all(x is None or x <= 1e-5 for x in entry.not_float64.values()), entry.name
    said = catalogue.not_in_float64()
    assert "short clips (qwen3_asr: 4e-07)" in said and "left padding (voxtral)" in said
    shown = CliRunner().invoke(app, ["models"])
    assert "float64 leaves out the batches" in " ".join(shown.output.split())


def test_hooks_are_counted_as_they_are_now() -> None:
    for entry in Catalogue.load().entries:
        model = FAMILIES[entry.name].hooked(FAMILIES[entry.name].build())
        for part, count in entry.hooks_per_block.items():
            names = [name for name in model.hook_dict if name.startswith(f"{part}.blocks.0.")]
            assert len(names) == count, entry.name


def test_command_and_readme_show_it() -> None:
    shown = CliRunner().invoke(app, ["models", "--json"])
    assert shown.exit_code == 0 and "granite_speech" in shown.output
    entries = Catalogue.load().entries
    single, double = (max(getattr(x, d) for x in entries) for d in ("float32", "float64"))
    said = README.read_text()
    assert (
        f"at most {single:.0e} of the largest value in float32 and {double:.0e} in float64" in said
    )
