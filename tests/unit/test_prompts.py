import json
import sys
from collections import Counter

import pytest

from alignprop.prompts import (
    ASSETS,
    HPS_STYLES,
    PROMPT_SETS,
    PromptSet,
    count_draws,
    draw_prompts,
    load_prompts,
    negatives_of,
    told_of_draws,
    told_of_epoch,
)
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


def test_geneval_has_its_six_kinds_of_prompts_with_their_metadata():
    loaded = load_prompts("geneval")
    assert Counter(row["tag"] for row in loaded.metadata) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert len(set(loaded.prompts)) == 553
    row = dict(zip(loaded.prompts, loaded.metadata, strict=True))["a photo of two clocks"]
    wanted = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
    assert row == {"tag": "counting", **wanted}


def test_partiprompts_have_their_categories_and_challenges():
    loaded = load_prompts("partiprompts")
    assert len(set(loaded.prompts)) == len(loaded) == 1632
    assert all(row.keys() == {"category", "challenge"} and all(row.values()) for row in loaded.metadata)
    categories = Counter(row["category"] for row in loaded.metadata)
    assert len(categories) == 12 and categories["Animals"] == 314 and categories["Indoor Scenes"] == 40
    assert len({row["challenge"] for row in loaded.metadata}) == 11
    assert next(prompt for prompt in loaded.prompts if prompt.startswith('"')).startswith('"G I G G L E" painted in')


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


ROWS = [("a red cat, sitting", {"count": "2", "style": 'say "hi"'}), ("two dogs", {"count": "3", "style": ""})]


@pytest.mark.parametrize(("name", "content"), [
    ("p.csv", 'prompt,count,style\r\n"a red cat, sitting",2,"say ""hi"""\r\n\r\ntwo dogs,3,\r\n'),
    ("p.csv", 'count,style,text\n2,"say ""hi""","a red cat, sitting"\n3,,two dogs'),
    ("p.tsv", 'prompt\tcount\tstyle\na red cat, sitting\t2\t"say ""hi"""\ntwo dogs\t3\t\n'),
    ("p.jsonl", "\n".join(json.dumps({"prompt": p, **m}) for p, m in ROWS) + "\n\n"),
    ("p.jsonl", "\n".join(json.dumps({"caption": p, "metadata": m}) for p, m in ROWS)),
    ("p.json", json.dumps([{"prompt": p, **m} for p, m in ROWS], indent=2)),
    ("p.json", json.dumps([{**m, "Prompts": p} for p, m in ROWS])),
    ("p.tsv", 'Prompt\tcount\tstyle\na red cat, sitting\t2\t"say ""hi"""\ntwo dogs\t3\t\n'),
])  # fmt: skip
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_have_a_prompt_and_metadata(tmp_path, name, content, mark):
    (tmp_path / name).write_bytes((mark + content).encode())
    loaded = load_prompts(str(tmp_path / name))
    assert list(zip(loaded.prompts, loaded.metadata, strict=True)) == ROWS


def test_of_several_columns_the_first_of_the_allowed_names_has_the_prompt(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("text,Prompt,prompt\na,b,c\n")
    assert load_prompts(str(path)).prompts == ("b",) and load_prompts(str(path)).metadata == (
        {"text": "a", "prompt": "c"},
    )


@pytest.mark.parametrize(("name", "content"), [
    ("p.json", '["a cat", "a dog"]'), ("p.jsonl", '"a cat"\n"a dog"\n'), ("p.csv", "prompt\na cat\na dog\n"),
])  # fmt: skip
def test_prompts_alone_have_no_metadata(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    loaded = load_prompts(name)
    assert (loaded.prompts, loaded.metadata) == (("a cat", "a dog"), ({}, {}))


@pytest.mark.parametrize(("name", "content", "told"), [
    ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "a dog"\n', "line 2 is not JSON"),
    ("p.jsonl", '{"prompt": "a cat"}\n\n{"promt": "a"}\n', "has no prompt or prompts or text or caption, but promt"),
    ("p.jsonl", '\n{"promt": "a dog"}\n', "line 2 has no prompt or"),
    ("p.jsonl", '["a cat"]', "line 1 is a list, not an object with a prompt"),
    ("p.jsonl", '{"prompt": ["a cat"]}', "line 1: prompt = ['a cat'] is not a text"),
    ("p.jsonl", '{"prompt": "  "}', "line 1: prompt = '  ' is not a text"),
    ("p.json", '[\n"a cat",\n]', "is not JSON"),
    ("p.json", '{"prompt": "a cat"}', "it holds one dict, not a list of prompts"),
    ("p.json", '["a cat", 3]', "entry 2 is a int"),
    ("p.csv", "a cat\na dog\n", "line 1 is the header and has none of the columns prompt, prompts, text, caption"),
    ("p.csv", "prompt,n\na red, old cat,2\n", "line 2 has 3 columns, the header 2"),
    ("p.csv", 'prompt,n\na cat,2\n"a dog,3\n', "line 3: unexpected end of data"),
    ("p.csv", "\n\n", "holds no prompt"),
    ("p.csv", "prompt,n,n\na cat,1,2\n", "line 1 is the header and names the column 'n' twice"),
    ("p.csv", "prompt,weight,Weight,weight\na cat,1,2,3\n", "names the column 'weight' twice"),
    ("p.txt", 'a cat\n{"prompt": "a dog"}\n', "line 2 is a JSON object; JSON lines are read from a .jsonl file"),
    ("p.txt", "a cat\t2\n", "line 1 holds a tab, as tables do; a table is read from a .tsv file"),
    ("p.yaml", "- a cat\n", ".yaml files are not read; .jsonl, .json, .csv, .tsv and text files are"),
])  # fmt: skip
def test_what_does_not_parse_is_told_with_its_place(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    text = message(str(tmp_path / name))
    assert text.startswith(f"prompt_fn = '{tmp_path / name}': ") and told in text


def test_a_prompt_in_braces_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("{a cat}, [a dog]\n")
    assert load_prompts(str(tmp_path / "p.txt")).prompts == ("{a cat}, [a dog]",)


# ---- the columns `weight` and `negative_prompt`


def test_a_prompt_is_drawn_as_often_as_its_weight_says(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a cat", "weight": 3}\n{"prompt": "a dog", "weight": 0}\n{"prompt": "an owl"}\n'
    )
    loaded = load_prompts(str(tmp_path / "p.jsonl"))
    assert loaded.weights == (3.0, 0.0, 1.0) and loaded.metadata[0] == {"weight": 3}
    cats, dogs, owls = count_draws(loaded, seed=0, steps=range(50), batch_size=40)
    assert dogs == 0 and cats + owls == 2000 and abs(cats - 1500) < 4 * (2000 * 0.75 * 0.25) ** 0.5
    prompts, metadata = draw_prompts(loaded, 0, 7, range(8))
    assert all(
        row == ({"weight": 3} if prompt == "a cat" else {}) for prompt, row in zip(prompts, metadata, strict=True)
    )


@pytest.mark.parametrize("name", ["P.CSV", "p.Tsv", "P.JSONL"])
def test_endings_and_columns_may_have_any_case(tmp_path, name):
    cells = [["Prompt", "Weight", "NEGATIVE_PROMPT", "Style"], ["a cat", "3", "", "photo"], ["a dog", "0", "blur", "x"]]
    if "JSON" in name:
        rows = [json.dumps(dict(zip(cells[0], row, strict=True))) for row in cells[1:]]
    else:
        rows = [("," if "CSV" in name else "\t").join(row) for row in cells]
    (tmp_path / name).write_text("\n".join(rows))
    loaded = load_prompts(str(tmp_path / name))
    assert loaded.prompts == ("a cat", "a dog") and loaded.weights == (3.0, 0.0)
    assert negatives_of(loaded)["a dog"] == "blur" and loaded.metadata[0]["Style"] == "photo"


def test_columns_without_a_name_are_allowed(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,weight,,\na cat,1,,\n")
    assert load_prompts(str(tmp_path / "p.csv")).weights == (1.0,)


def test_without_that_column_all_are_drawn_equally_often(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,style\na cat,photo\n")
    assert load_prompts(str(tmp_path / "p.csv")).weights is None


@pytest.mark.parametrize(("weights", "told"), [
    (["2", "-1"], "weight = '-1' of 'b' must be a finite number of at least 0"),
    (["much", "1"], "weight = 'much' of 'a' must be a finite number of at least 0"),
    (["inf", "1"], "weight = 'inf' of 'a' must be"), (["0", "0.0"], "all prompts have weight = 0"),
    (["", "-1"], "weight = '-1' of 'b' must be"),  # an empty cell is 1
    (["1e308", "1e308"], "the sum of the column weight must be a finite number"),
])  # fmt: skip
def test_a_weight_that_is_none_is_refused(tmp_path, weights, told):
    (tmp_path / "p.csv").write_text(
        "prompt,weight\n" + "".join(f"{p},{w}\n" for p, w in zip("ab", weights, strict=True))
    )
    assert told in message(str(tmp_path / "p.csv"))


def test_a_weight_that_no_float_can_hold_is_refused_and_one_that_is_missing_is_1(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "weight": 1' + "0" * 400 + "}")
    assert "of 'a' must be a finite number" in message(str(path))
    path.write_text('{"prompt": "a", "weight": null}\n{"prompt": "b", "weight": 2}')
    assert load_prompts(str(path)).weights == (1.0, 2.0)
    assert load_prompts(str(path), field="eval_prompt_fn").weights is None  # an evaluation takes the prompts in turn


def test_prompts_have_negative_prompts_of_their_own():
    one = PromptSet("one", ("a cat", "a dog", "a bee"), ({"negative_prompt": "blurry"}, {}, "metadata of a function"))
    two = PromptSet("two", ("a cat", "an owl"), ({"negative_prompt": "blurry"}, {"negative_prompt": ""}))
    assert negatives_of(one, two) == {"a cat": "blurry", "an owl": ""}
    with pytest.raises(ConfigError, match="'three': 'a cat' has the negative prompts 'blurry' and 'dark'"):
        negatives_of(one, PromptSet("three", ("a cat",), ({"negative_prompt": "dark"},)))
    with pytest.raises(ConfigError, match="'three': 'a cat' has the negative prompts 'blurry' and None"):
        negatives_of(one, PromptSet("three", ("a cat",), ({},)))
    with pytest.raises(ConfigError, match="negative_prompt = 3 of 'a cat' must be text"):
        negatives_of(PromptSet("three", ("a cat",), ({"negative_prompt": 3},)))


def test_an_empty_cell_is_no_negative_prompt(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na cat,blurry\na dog,\n")
    assert negatives_of(load_prompts(str(tmp_path / "p.csv"))) == {"a cat": "blurry"}


# ---- datasets


def test_a_dataset_is_read_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {"caption": ["a cat", "a dog"], "style": ["photo", None], "tags": [["x"], ["y"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d" / "train.parquet")
    datasets.Dataset.from_dict({"caption": ["an owl"]}).to_parquet(tmp_path / "d" / "test.parquet")
    loaded = load_prompts(f"dataset:{tmp_path / 'd'}")
    assert loaded.prompts == ("a cat", "a dog") and loaded.metadata == ({"style": "photo"}, {"style": None})
    assert load_prompts(f"dataset:{tmp_path / 'd'}:test").prompts == ("an owl",)
    assert "Unknown split" in message(f"dataset:{tmp_path / 'd'}:validation")
    datasets.Dataset.from_dict({"words": ["an owl"]}).to_parquet(tmp_path / "e" / "train.parquet")
    assert "row 1 has no prompt or prompts or text or caption, but words" in message(f"dataset:{tmp_path / 'e'}")
    monkeypatch.setattr("alignprop.settings.prompt_files._is_on_hub", lambda name: False)
    text = message(f"dataset:{tmp_path / 'nowhere'}", field="eval_prompt_fn")
    assert text.startswith(f"eval_prompt_fn = 'dataset:{tmp_path / 'nowhere'}': it cannot be loaded")
    assert message("dataset: :test").endswith("the name of the dataset is missing")


def test_without_the_package_a_dataset_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message("dataset:lab/prompts") == (
        "prompt_fn = 'dataset:lab/prompts': this needs the package datasets: pip install datasets"
    )


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


def test_what_is_told_of_the_draws_is_what_was_drawn():
    numbers = prompt_set(5)
    drawn = [prompt for step in range(3) for prompt in draw_prompts(numbers, 0, step, range(4))[0]]
    counts = [drawn.count(prompt) for prompt in numbers.prompts]
    assert count_draws(numbers, 0, range(3), 4) == counts
    some = [count for count in counts if count]
    assert told_of_draws(numbers, 0, range(3), 4) == (
        f"prompts: {len(some)} of 5 were drawn, each {min(some)} to {max(some)} times"
    )
    assert told_of_draws(prompt_set(1), 0, range(2), 4) == "prompts: 1 of 1 were drawn, each 8 times"
    assert told_of_draws(prompt_set(1), 0, range(1), 1) == "prompts: 1 of 1 were drawn, each once"
    assert told_of_draws(numbers, 0, range(0), 4) == "prompts: 0 of 5 were drawn"
    assert "were drawn since step 2, each" in told_of_draws(numbers, 0, range(2, 3), 4)


def test_an_epoch_says_whether_it_is_longer_than_the_prompt_set():
    texts = [told_of_epoch(prompt_set(size), 10) for size in (5, 10, 20)]
    assert texts == [
        f"an epoch is {length} the prompt set: it draws at random 10 times from {size} prompts"
        for length, size in (("longer than", 5), ("as long as", 10), ("shorter than", 20))
    ]


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
