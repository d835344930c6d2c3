"""The conformance suite for backbones: a good one passes, and each broken one fails the checks that name its fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import coatkit.testing
from coatkit.testing import BackboneConformance
from coatkit.verdict import Report, run_tests

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "broken_backbones.py"
NEW_PROCESS = (
    "test_entry_module_imports_no_torch",
    "test_works_in_a_fresh_process",
    "test_uses_no_network",
    "test_writes_nothing_at_home",
)
SLOW = ("test_train_options", "test_bfloat16_trains", "test_embeddings")
"""Checks of many loads, tried only on the backbones that must fail them and on the good ones."""

Faults = dict[str, dict[str, str]]
"""Broken backbone to the checks it fails, and a piece of what each says."""


def run_suite(folder: Path, source: str, site: Path | None = None) -> Report:
    """Run pytest on a file as an author would, in a process of its own."""
    groups = ("Loading", "Sketch", "Folder", "Preparing", "Forward", "Learning", "Generating")
    imports = [f"from coatkit.testing.backbone_{name.lower()} import {name}Checks" for name in groups]
    head = ["from coatkit.testing import BackboneConformance", *imports, "", ""]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "" if site is None else str(site)}
    return run_tests("\n".join(head) + source, folder, ["-W", "error::pytest.PytestWarning"], environment)


def suite_of(
    name: str, group: str = "BackboneConformance", body: str = "", use: str = "", without: tuple[str, ...] = ()
) -> str:
    """An author's test class for one of the broken backbones, or for `use`."""
    lines = [f"class Test{name}({group}):", f"    name = {use or f'{BROKEN}:{name}'!r}"]
    lines += ["    options = {'weights': 'random'}", *(f"    {check} = None" for check in without), body, "", ""]
    return "\n".join(lines)


def failed(report: Mapping[str, tuple[str, str]]) -> set[str]:
    assert not [text for outcome, text in report.values() if outcome == "error"]
    return {name for name, (outcome, _) in report.items() if outcome == "failed"}


# --- one fault, the checks that name it, and what they say

GREEDY = [f"test_answer_is_greedy_decoding[{row}]" for row in ("one", "text", "two")]
CHECKPOINTING = [f"test_gradient_checkpointing_changes_no_gradient[{tower}]" for tower in ("frozen", "learning")]
SKETCH = "test_sketch_is_the_loaded_model"
DAMAGED = {
    how: f"test_damaged_model_folder_is_refused[{how}]"
    for how in ("missing", "unexpected", "shape", "truncated", "gone")
}
BATCH = "test_left_padded_answers_are_greedy_too"
LOADING: Faults = {
    "CannotLoad": {"test_loads": "cannot be loaded: OSError: no libsound.so"},
    "LoadsDiffer": {
        "test_second_load_is_equal": "model.language_model.norm.weight is another one in a second instance",
        "test_fingerprint_is_stable": "two instances with the same options have different fingerprints",
    },
    "SeedsGlobally": {"test_leaves_global_state_alone": "it changed Python's global random state (in loading)"},
    "FingerprintIgnoresWeights": {"test_fingerprint_follows_the_weights": "does not change when model.audio_tower"},
    "FingerprintOfEverything": {"test_fingerprint_is_stable": "its fingerprint changes when it learns or is used"},
    "FingerprintOfTheInstance": {"test_fingerprint_is_stable": "two instances with the same options have different"},
    "FallsBackToRandom": {"test_a_folder_without_a_model_is_refused": "an empty folder as `weights` loads"},
    "PreparerWithModel": {"test_preparer_holds_no_network": "its preparer holds a network: model"},
}
SKETCHING: Faults = {
    "SketchOfAnotherSize": {SKETCH: "of one model: parameter model.language_model.layers.2."},
    "SketchWithoutAPart": {SKETCH: "of one model: the count of parts is {"},
    "SketchThatFreezesNothing": {SKETCH: "of one model: the count of frozen parameters is 1 in the sketch and"},
    "SketchWithValues": {SKETCH: "sketch() fills model."},
    "CannotSketch": {SKETCH: "sketch() raised AttributeError: 'CannotSketch' object has no attribute 'gone'"},
    "SketchesADict": {SKETCH: "sketch() gave a dict"},
    "CostsTheSameForever": {SKETCH: "tower_flops of 0.5, 1, 10 and 40 s are 1e+09, 1e+09, 1e+09, 1e+09"},
    "LearnsBackwards": {SKETCH: "tower_backward of 0.5, 1, 10 and 40 s are 2e+09, 1e+09, 1e+08"},
}
FOLDER: Faults = {
    "IgnoresTheFolder": {
        "test_model_folder_is_read": "with other values in audio_tower.layers.0.",
        **dict.fromkeys(DAMAGED.values(), "and it loads without a word"),
    },
    "TakesWhatFits": {
        DAMAGED["missing"]: "is missing from the model folder, and it loads without a word",
        DAMAGED["unexpected"]: "holds an unknown tensor conformance_extra beside",
        DAMAGED["shape"]: "has another shape in the model folder, and it loads without a word",
        DAMAGED["truncated"]: "is cut in half, and the error is no coatkit.AssetError but",
        DAMAGED["gone"]: "has no model.safetensors, and the error is no coatkit.AssetError but",
    },
    "SaysNothingOfTheFolder": dict.fromkeys(DAMAGED.values(), "and the error does not name /"),
}
PREPARING: Faults = {
    "CannotPrepare": {"test_prepares": "preparing plain rows raised AttributeError: 'preparer_type' object has no"},
    "AlwaysAfterTheHeader": {
        "test_block_stands_in_its_place[before_header]": "with placement before_header the prompt is not the plain"
    },
    "AnswersWithoutABlock": {
        "test_block_stands_in_its_place[response_prefix]": "with placement response_prefix the prompt is not",
        "test_block_stands_in_its_place[before_header]": "before the assistant header, but",
        "test_prompt_begins_the_training_row[response_prefix]": "row 'one' is not the beginning of its training row",
        "test_prompt_begins_the_training_row[before_header]": "row 'one' is not the beginning of its training row",
    },
    "BlockWithoutSettings": {
        "test_block_stands_in_its_place[response_prefix]": "the prompt is not the plain prompt with",
        "test_block_stands_in_its_place[before_header]": "the prompt is not the plain prompt with",
        "test_thinking_off_leaves_the_block_out": "with thinking: off is not the same row without its block",
        "test_block_length_follows_the_spec[0.5]": "have [10, 4, 22] thinking positions; expected [5, 2, 11]",
        "test_block_length_follows_the_spec[2.0]": "have [10, 4, 22] thinking positions; expected [20, 8, 44]",
    },
    "LabelsOnThePrompt": {"test_labels_are_on_answers_only": "row 'one' learns '<|im_start|>system"},
    "AnswersWithoutEnd": {"test_labels_are_on_answers_only": "row 'one' learns 'A dog.', where every answer must end"},
    "NoMask": {"test_padding_sides": "rows of different lengths have no padding"},
    "PositionsBeforePadding": {"test_positions_are_named": "other positions than those that hold <sound> (train=False"},
    "ReordersSounds": {"test_several_sounds": "sounds and their thinking positions are not in order"},
    "RemovesForeignTokens": {"test_foreign_tokens_are_refused": "holds <|audio_think_start|> is let through"},
    "TakesEndlessRows": {"test_long_rows_are_refused": "a row of more than max_tokens (8192) tokens is let through"},
    "ScalesItsInput": {"test_input_is_left_alone": "prepare changed audio.samples"},
    "RemembersRows": {
        "test_input_is_left_alone": "preparing the same row again gives another input_features",
        "test_travels_to_data_workers": "sent to another process, gives other inputs",
    },
    "PreparerWithAHook": {"test_travels_to_data_workers": "pickling its preparer raised AttributeError"},
}
FORWARD: Faults = {
    "OneTokenMore": {
        "test_hears[0.02]": "preparing 0.02 s raised DataError",
        "test_hears[0.05]": "0.05 s has [1] placeholders, and audio_tokens says 2",
        "test_hears[1.0]": "1 s has [25] placeholders, and audio_tokens says 26",
        "test_hears[3.337]": "and audio_tokens says 84",
        "test_hears[29.99]": "and audio_tokens says 751",
        "test_hears[30.0]": "and audio_tokens says 751",
        "test_hears[longest]": "35 s has [875] placeholders, and audio_tokens says 876",
        "test_audio_tokens_are_exact": "half a mel frame apart",
    },
    "OtherRounding": {"test_output_is_as_declared": "a pass over plain rows raised ValueError: Audio features and"},
    "CutsLongSounds": {"test_hears[longest]": "audio_tokens gives 750 for 35 s, 21.43 per second"},
    "BareShortSounds": {"test_hears[0.02]": "is not refused by name: IndexError: tuple index out of range"},
    "SecretlyDeafBeyondASecond": {
        **{f"test_hears[{seconds}]": "is ' '" for seconds in (3.337, 29.99, 30.0)},
        "test_hears[longest]": "cannot_hear(35) is ' '",
    },
    "Deaf": {"test_sound_is_heard": "audio.consumed is the same for another sound of the same length"},
    "WrongTowerWidth": {"test_output_is_as_declared": "audio.tower is (3, 22, 32); expected (3, 22, 384)"},
    "TargetWithGradient": {"test_output_is_as_declared": "audio.consumed carries gradient, and it is a target"},
    "CountsItsPasses": {
        "test_forward_is_repeatable": "a second pass over the same inputs gives another ce_sum",
        "test_padding_changes_nothing": "row 'one' has the loss",
        "test_states_and_loss_are_the_decoders": "the cross-entropy of each answer token given all before it is",
    },
    "RowsSeeEachOther": {"test_padding_changes_nothing": "in a padded batch with rows that have sounds: values differ"},
    "TextRowsHearSounds": {
        "test_padding_changes_nothing": "a row of text alone has the loss",
        "test_states_and_loss_are_the_decoders": "where the cross-entropy of each answer token",
    },
    "TowerWithPadding": {
        "test_audio_tokens_are_exact": "a sound of 1600 samples has another audio.tower beside other sounds",
        "test_padding_changes_nothing": "sound 0 of row 'one' has another audio.tower beside other sounds than alone",
    },
    "NormalisesConsumed": {"test_consumed_is_what_the_decoder_sees": "is not what its placeholders hold when"},
    "StatesOneTooEarly": {"test_states_and_loss_are_the_decoders": "thinking is not what the language model's last"},
    "LossOfTheSameToken": {"test_states_and_loss_are_the_decoders": "where the cross-entropy of each answer token"},
    "TowerRunsTwice": {"test_tower_runs_once": "one pass runs the audio tower 2 times"},
    "CountsNoPlaceholders": {
        "test_mismatch_is_refused[fewer]": "forward takes a batch with one placeholder fewer than features without",
        "test_mismatch_is_refused[more]": "one placeholder more than features with a bare RuntimeError",
    },
    "UnitsOfTheTower": {"test_units_run_once": "runs 0 times in a pass over rows of text alone"},
}
LEARNING: Faults = {
    "ForgetsAPart": {"test_parts_are_what_learns": "linear_1.weight asks for gradient and is in none of parts()"},
    "LearnsWithoutUse": {"test_gradient_reaches_what_learns": "unused is to learn and gets no gradient"},
    "AdaptersOnTheTower": {
        "test_adapters_are_on_the_language_model_only": "3 adapters are outside of the language model"
    },
    "EmbeddingMoves": {"test_step_moves_only_what_learns": "moves model.language_model.embed_tokens.weight, which is"},
    "EmbeddingLearns": {"test_step_moves_only_what_learns": "the input embedding learns"},
    "OneRowForAll": {"test_thinking_rows_are_the_blocks": "where <|audio_think|> stands, the decoder does not see"},
    "TowerInTrainingMode": {"test_frozen_tower_stays_in_eval_mode": "the frozen audio tower's top is in training mode"},
    "IgnoresCheckpointing": dict.fromkeys(CHECKPOINTING, "first layer runs 1 times; expected 2"),
    "CheckpointsTheTower": dict.fromkeys(CHECKPOINTING, "the audio tower runs 2 times, without it 1"),
    "CheckpointsFromTheTop": {CHECKPOINTING[1]: "the audio tower runs 2 times, without it 1"},
    "IgnoresTrain": {
        f"test_train_options[{choice}]": f"with train: {{{choice}}} the parts that learn are ['lora', 'projector', 'to"
        for choice in ("lm: full", "lm: none", "tower: full", "projector: none", "tokens: none")
    },
    "LearnsInBfloat16": {"test_bfloat16_trains": "with dtype: bfloat16 what learns is {torch.bfloat16}"},
    "SecretAverage": {
        "test_checkpoint_brings_back_what_was_learnt": "loaded into a new instance, ce_sum is another one"
    },
    "AdaptersWithAnExtra": {"test_merged_adapters_change_nothing": "merging the adapters changes the loss"},
    "RefusesTied": {"test_embeddings[tied]": "raised ValueError: tied embeddings are not supported"},
}
GENERATING: Faults = {
    "AnswersToNothing": {"test_generates_text": " for 3 row(s)"},
    "ForgetsTheBlock": dict.fromkeys((GREEDY[0], GREEDY[2], BATCH), "is more likely"),
    "PenalisesRepetition": dict.fromkeys((*GREEDY, BATCH), "is not answered with the most likely tokens"),
    "AnswersWithThePrompt": {
        **dict.fromkeys((*GREEDY, BATCH), "its tokens say"),
        "test_answer_ends_with_its_turn": "0 more steps are made; the answer is 'user",
    },
    "MayAnswerTheBlock": {"test_block_and_placeholder_are_never_answered": "is answered where it is most likely"},
    "WithoutCache": {"test_prompt_and_block_are_one_prefill": "positions; expected [189, 1, 1, 1]"},
    "NeverEnds": {"test_answer_ends_with_its_turn": "after <|im_end|>, which ends a turn, 4 more steps are made"},
    "KeepsTheLastPrompt": {"test_answering_leaves_training_alone": "after an answer, the same pass gives another ce"},
    "LeavesTrainingOn": {"test_answering_leaves_training_alone": "after an answer model.language_model is in another"},
}
GROUPS = {
    "Loading": LOADING,
    "Sketch": SKETCHING,
    "Folder": FOLDER,
    "Preparing": PREPARING,
    "Forward": FORWARD,
    "Learning": LEARNING,
    "Generating": GENERATING,
}
CASES = [(group, name) for group, faults in GROUPS.items() for name in faults]


OWN_FOLDER = """
    def model_folder(self, folder):
        import torch
        from safetensors.torch import save_file

        save_file({"model.layers.0.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
        return folder
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every broken backbone on the group of checks it must fail, without those that start a process."""
    source = suite_of("Bare", without=NEW_PROCESS)
    source += suite_of("Good", body="    several_sounds = False", without=(*NEW_PROCESS, *SLOW))
    source += suite_of("OwnFolder", "FolderChecks", OWN_FOLDER, use=f"{BROKEN}:Good")
    for group, faults in GROUPS.items():
        for name, wanted in faults.items():
            asked = {check.partition("[")[0] for check in wanted}
            without = {"Loading": NEW_PROCESS, "Learning": tuple(c for c in SLOW if c not in asked)}.get(group, ())
            source += suite_of(name, f"{group}Checks", without=without)
    return run_suite(tmp_path_factory.mktemp("broken"), source)


@pytest.mark.parametrize(("group", "name"), CASES, ids=[name for _, name in CASES])
def test_a_broken_backbone_fails_the_checks_that_name_its_fault(reports: Report, group: str, name: str) -> None:
    found, wanted = reports[f"Test{name}"], GROUPS[group][name]
    assert failed(found) == set(wanted)
    for check, said in wanted.items():
        text = found[check][1]
        assert said in text
        assert f"backbone '{BROKEN}:{name}': " in text
        assert re.search(r"What to do: \w+", text)
        assert "Traceback" not in text


def test_only_the_protocol_is_needed(reports: Report) -> None:
    """A backbone that is no HFBackbone passes what can be known from outside."""
    found = reports["TestBare"]
    assert not failed(found)
    assert sum(outcome == "passed" for outcome, _ in found.values()) >= 30
    skipped = {text for outcome, text in found.values() if outcome == "skipped"}
    assert any("it is no coatkit.HFBackbone, so its inside is not known" in text for text in skipped)


def test_an_authors_model_folder_must_load(reports: Report) -> None:
    found = reports["TestOwnFolder"]
    assert failed(found) == {"test_model_folder_is_read"}
    assert "a whole model folder does not load: AssetError" in found["test_model_folder_is_read"][1]
    for name in DAMAGED.values():
        assert "its model folder does not load; test_model_folder_is_read says why" in found[name][1]


def test_a_backbone_of_one_sound_a_row_must_refuse_more(reports: Report) -> None:
    """The good one takes several, so saying that it does not is a fault, and the only one."""
    found = reports["TestGood"]
    assert failed(found) == {"test_several_sounds"}
    assert "a row with several sounds is let through" in found["test_several_sounds"][1]


def test_what_is_left_out_says_why(reports: Report) -> None:
    for name, said in (
        ("CannotLoad", "it could not be loaded; test_loads says why"),
        ("CannotPrepare", "the plain rows cannot be prepared; test_prepares says why"),
        ("WrongTowerWidth", "test_output_is_as_declared says why"),
    ):
        skipped = [text for outcome, text in reports[f"Test{name}"].values() if outcome == "skipped"]
        assert len(skipped) >= 5
        assert all(said in text for text in skipped if "no installed plugin" not in text)


# --- what only an installed plugin can do wrong

ENTRY = """
from coatkit import Manifest, hookimpl
{more}

@hookimpl
def coatkit_manifests():
    return [
        Manifest(kind="backbone", name="{name}", target="backbones_code:{target}", frame_rate={rate}, dim={dim})
    ]
"""
CARELESS = {
    "test_entry_module_imports_no_torch": "importing coatkit_backbone_careless imports torch",
    "test_manifest_is_true": "its manifest says frame_rate 50, the loaded backbone 25",
    "test_uses_no_network": "tried to reach the network: look up 'weights.example'",
    "test_writes_nothing_at_home": "wrote to the home folder: ~/mini_was_here",
    "test_works_in_a_fresh_process": "its fingerprint is another one in a new process",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Plugins laid out as pip does: a good one, and one that is careless in every way."""
    site = tmp_path_factory.mktemp("site")
    (site / "backbones_code.py").write_text(BROKEN.read_text())
    for name, more, target, rate, dim in (
        ("fine", "", "Good", 25, 576),
        ("careless", "import torch", "Careless", 50, None),
        ("narrow", "", "Good", 25, 64),
    ):
        module = f"coatkit_backbone_{name}"
        (site / f"{module}.py").write_text(ENTRY.format(name=name, more=more, target=target, rate=rate, dim=dim))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: coatkit-backbone-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[coatkit]\n{name} = {module}\n")
    authors = site / "authors"
    authors.mkdir()
    source = suite_of("Fine", use="fine") + suite_of("Careless", "LoadingChecks", use="careless")
    source += suite_of("Narrow", "LoadingChecks", use="narrow", without=NEW_PROCESS)
    return run_suite(authors, source, site)


def test_a_good_plugin_passes_every_check(installed: Report) -> None:
    assert {outcome for outcome, _ in installed["TestFine"].values()} == {"passed"}
    assert {name.partition("[")[0] for name in installed["TestFine"]} == checks()


def test_faults_of_an_installed_plugin_are_seen(installed: Report) -> None:
    assert failed(installed["TestCareless"]) == set(CARELESS)
    for check, said in CARELESS.items():
        assert said in installed["TestCareless"][check][1]


def test_dim_is_that_of_the_default_weights_which_need_not_be_there(installed: Report) -> None:
    """It is the width of the tiny model the suite runs on, and the default's is 576."""
    found = installed["TestNarrow"]
    assert failed(found) == {"test_manifest_is_true"}
    assert "its manifest says dim 64, the default backbone 576" in found["test_manifest_is_true"][1]


# --- the kit itself


def checks() -> set[str]:
    return {name for name in dir(BackboneConformance) if name.startswith("test_")}


def test_every_check_is_failed_by_some_broken_backbone() -> None:
    everything = [faults for group in GROUPS.values() for faults in group.values()]
    found = {check.partition("[")[0] for faults in [*everything, CARELESS] for check in faults}
    assert found == checks()


def test_the_documentation_names_every_check_and_setting() -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    text = text.partition("# Testing a backbone")[2]
    assert set(re.findall(r"^\| (test_\w+) \|", text, re.MULTILINE)) == checks()
    settings = {name for name in vars(coatkit.testing.backbone_base.BackboneBase) if name[0] != "_"}  # type: ignore[attr-defined]
    settings = {name for name in settings if not callable(getattr(BackboneConformance, name))} - {"kind", "bench"}
    assert settings == {"several_sounds", "seconds", "longest_seconds", "tolerance"}
    assert {name for name in settings if f"`{name}`" not in text} == set()
