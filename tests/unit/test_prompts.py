import json

import pytest

from alignprop.prompts import ASSETS, HPS_STYLES, PROMPT_SETS, PromptSet, draw_prompts, load_prompts
from alignprop.settings.errors import ConfigError


def message(name, **kwargs):
    """The text of the ConfigError that loading `name` raises; one line, as it is shown to a person."""
    with pytest.raises(ConfigError) as caught:
        load_prompts(name, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prompt_set(size):
    return PromptSet("numbers", tuple(f"prompt {i}" for i in range(size)), tuple({"i": i} for i in range(size)))


# ---- named sets


def test_animals_are_45_and_the_evaluation_has_others():
    train, held_out = load_prompts("simple_animals"), load_prompts("eval_simple_animals")
    assert len(train) == len(set(train.prompts)) == 45
    assert len(held_out) == len(set(held_out.prompts)) >= 6
    assert not set(train.prompts) & set(held_out.prompts)
    assert all(prompt.isalpha() and prompt.islower() for prompt in train.prompts + held_out.prompts)
    assert train.metadata == ({},) * 45


@pytest.mark.parametrize("name", ["tiny_train", "tiny_heldout"])
def test_tiny_sets_are_the_files_beside_the_tiny_model(name, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "prompts_train.txt").write_text("two red circles\n")
    (tmp_path / "tiny" / "prompts_heldout.txt").write_text("one blue square\n")
    monkeypatch.setattr("alignprop.prompts.ASSETS", tmp_path)
    expected = {"tiny_train": "two red circles", "tiny_heldout": "one blue square"}
    assert load_prompts(name).prompts == (expected[name],)


def test_assets_are_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_prompts("simple_animals").prompts[0] == "cat"
    assert ASSETS.is_absolute()


def test_unknown_name_lists_the_names_and_the_nearest():
    text = message("simple_animal", field="eval_prompt_fn")
    assert text.startswith("eval_prompt_fn = 'simple_animal'")
    assert "did you mean 'simple_animals'?" in text
    assert all(name in text for name in PROMPT_SETS)
    assert "did you mean" not in message("zzz")
    assert "not a prompt set" in message("")


# ---- text files


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  # not a comment \r\nein Bär, 熊\n\n\na line\u2028separator".encode())
    loaded = load_prompts(str(path))
    assert loaded.prompts == ("a cat", "# not a comment", "ein Bär, 熊", "a line\u2028separator")
    assert loaded.metadata == ({},) * 4
    assert loaded.name == str(path)


def test_text_file_needs_no_suffix_and_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "list").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("list").prompts == ("a cat",)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_prompts("~/list").prompts == ("a cat",)


def test_bad_text_files_are_one_plain_line_each(tmp_path):
    missing, empty, latin = tmp_path / "missing", tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n  \n")
    latin.write_bytes("Bär".encode("latin-1"))
    assert "No such file" in message(str(missing))
    assert "No such file" in message("missing.txt")
    assert "holds no prompt" in message(str(empty))
    assert "not UTF-8" in message(str(latin))
    assert "directory" in message(str(tmp_path)).lower()
    assert "No such file" in message("~no_such_person/prompts.txt")
    assert "not a prompt set" in message("x" * 5000)  # longer than a file's name may be
    assert all(message(str(path)).startswith(f"prompt_fn = '{path}'") for path in (missing, empty, latin))


# ---- the HPSv2 benchmark


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache and no network; returns a function that puts the benchmark's files there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fill(prompts_of):
        repo, commit = tmp_path / "datasets--zhwang--HPDv2", "0" * 40
        folder = repo / "snapshots" / commit / "benchmark"
        folder.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        for style in HPS_STYLES:
            (folder / f"{style}.json").write_text(json.dumps(prompts_of(style)))

    return fill


def test_hps_holds_out_the_last_50_of_every_style(hub_cache):
    hub_cache(lambda style: [f"{style} {i}" for i in range(60)])
    train, held_out = load_prompts("hps_v2_all"), load_prompts("eval_hps_v2_all")
    assert train.prompts == tuple(f"{style} {i}" for style in HPS_STYLES for i in range(10))
    assert held_out.prompts == tuple(f"{style} {i}" for style in HPS_STYLES for i in range(10, 60))
    assert train.metadata == tuple({"style": style} for style in HPS_STYLES for _ in range(10))
    assert held_out.metadata == tuple({"style": style} for style in HPS_STYLES for _ in range(50))


def test_hps_out_of_reach_says_what_was_tried_and_what_to_do(hub_cache):
    text = message("hps_v2_all")
    assert "benchmark/anime.json" in text and "zhwang/HPDv2" in text
    assert "HF_HOME" in text and "text file" in text


@pytest.mark.parametrize("content", [{"a": 1}, ["x"] * 50, [1] * 60, "prompts"])
def test_hps_file_of_another_format_is_refused(hub_cache, content):
    hub_cache(lambda style: content)
    assert "JSON list" in message("hps_v2_all")


# ---- drawing


def test_a_sample_keeps_its_prompt_however_the_batch_is_cut():
    numbers = prompt_set(100)
    whole = draw_prompts(numbers, 0, 3, range(16))
    assert len(whole[0]) == len(whole[1]) == 16
    for cut in ([range(16)], [range(0, 8), range(8, 16)], [[j] for j in range(16)], [range(0, 16, 2)]):
        for part in cut:
            prompts, metadata = draw_prompts(numbers, 0, 3, part)
            assert prompts == [whole[0][j] for j in part]
            assert metadata == [whole[1][j] for j in part]
    assert all(prompt == f"prompt {m['i']}" for prompt, m in zip(*whole, strict=True))


def test_draws_differ_between_samples_steps_and_seeds():
    numbers = prompt_set(1000)
    draws = [tuple(draw_prompts(numbers, seed, step, range(8))[0]) for seed in (0, 1) for step in (0, 1)]
    assert len(set(draws)) == 4
    assert all(len(set(draw)) > 4 for draw in draws)


def test_draws_are_uniform():
    """Chi-squared over 10 prompts in 2,000 draws: with 9 degrees of freedom 1 in 1,000 exceeds 27.9."""
    prompts, _ = draw_prompts(prompt_set(10), 0, 0, range(2000))
    counts = [prompts.count(f"prompt {i}") for i in range(10)]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9


def test_a_reward_that_changes_its_metadata_changes_nothing_else():
    numbers = prompt_set(1)
    draw_prompts(numbers, 0, 0, [0])[1][0]["i"] = "changed"
    assert numbers.metadata == ({"i": 0},)
