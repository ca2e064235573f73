"""Publishing, against a stand-in of the hub on this machine; nothing here leaves it."""

import json
import re
import shlex
import socket

import pytest
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from alignprop.build import build_run
from alignprop.command import main
from alignprop.lora.files import LORA_FILE
from alignprop.publish.hub import check_hub, push
from alignprop.run import Run
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields.rules import is_repo_name
from alignprop.settings.resolve import resolve, save_config
from alignprop.trainer import AlignPropTrainer
from tests.cli.test_main import flags, run_main
from tests.helpers.fake_hub import Repository, logged_in
from tests.helpers.training import asks_to_stop, train
from tests.unit.test_resolve import preset

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, known to this process as the hub, where "me" is logged in."""
    with logged_in("me", TOKEN, monkeypatch, tmp_path, organisations=["lab"]) as stand_in:
        yield stand_in


@pytest.fixture
def run_folder(tmp_path):
    """What a run of 4 steps might have left, its second checkpoint being the best."""
    folder = tmp_path / "r"
    for step in (2, 4):
        (folder / "checkpoints" / f"checkpoint_{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"checkpoint_{step}" / LORA_FILE).write_bytes(b"weights of step %d" % step * 100)
    (folder / "checkpoints" / "best").symlink_to("checkpoint_2")
    save_config(resolve(preset(), 1), folder / "config.json")
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "rewards": {"hps": 0.2}}\n')
    (folder / "curves.png").write_bytes(b"curves")
    return folder


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the whole way


def test_training_publishes_its_run_and_the_token_stays_where_it_is(toy_config, tmp_path, hub):
    config = toy_config(run_name="r", num_epochs=1, hub__repo="lab/toy", hub__private=True)
    surroundings = {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    done = run_main(*flags(config), environment=surroundings)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/lab/toy" in done.stdout

    repository, folder = hub.repositories["lab/toy"], tmp_path / "logs" / "r"
    assert repository.private and repository.commits == ["r, optimizer step 2"]
    names = {
        LORA_FILE: f"checkpoints/checkpoint_2/{LORA_FILE}",
        **{name: name for name in ("config.json", "metrics.jsonl", "curves.png", "before_after.png")},
    }
    pictures = {f"images/{n}.png" for n in range(2)}
    assert repository.files.keys() == {*names, *pictures, "README.md"}
    for name, own in names.items():
        assert repository.files[name] == (folder / own).read_bytes(), name
    card = repository.files["README.md"].decode()
    assert "python main.py --config=config/align_prop.py:quickstart" in card and "hub.repo=lab/toy" in card

    ours = r"whoami|repos/create|/preupload/|/lfs/|/commit/|validate"
    assert {token for _, path, token in hub.requests if re.search(ours, path)} == {TOKEN}
    assert (hub.called("whoami"), hub.called("repos/create"), hub.called("/commit/")) == (1, 1, 1)
    everything = [*everything_in(tmp_path).values(), *repository.files.values(), (done.stdout + done.stderr).encode()]
    assert not [content for content in everything if b"s3cret" in content]


def test_an_upload_that_fails_loses_nothing_and_tells_how_to_repeat_it(toy_config, hub, monkeypatch, capsys):
    hub.failures = {("POST", "/commit/"): 500}
    trainer = AlignPropTrainer(toy_config(run_name="a run", num_epochs=1, hub__repo="me/toy", hub__private=True))
    with pytest.raises(ConfigError, match=r"training is done and .*the hub answers 500: out of order") as told:
        trainer.train()
    assert "\n" not in str(told.value) and TOKEN not in str(told.value)
    assert checkpoints_of(trainer.run.folder) and hub.repositories["me/toy"].files == {}

    hub.failures = {}
    command = shlex.split(str(told.value).rpartition("repeat the upload with: ")[2])
    folder = str(trainer.run.folder)
    assert command == ["python", "-m", "alignprop", "push", folder, "--repo", "me/toy", "--private"]
    before = everything_in(trainer.run.folder)
    monkeypatch.setattr("sys.argv", command[2:])
    main()
    assert capsys.readouterr().out.endswith(f"uploaded to {hub.url}/me/toy\n")
    weights = checkpoints_of(trainer.run.folder)[-1] / LORA_FILE
    assert hub.repositories["me/toy"].files[LORA_FILE] == weights.read_bytes() and hub.repositories["me/toy"].private
    assert everything_in(trainer.run.folder) == before


def test_other_processes_upload_nothing(toy_config, hub, monkeypatch):
    def finish(run):
        monkeypatch.setattr(Run, "is_main", False)

    monkeypatch.setattr(Run, "finish", finish)
    train(toy_config(num_epochs=1, hub__repo="me/toy"))
    assert hub.called("whoami") == 1 and hub.repositories == {}


def test_a_run_that_was_stopped_is_not_uploaded(toy_config, hub):
    with pytest.raises(SystemExit):
        AlignPropTrainer(toy_config(hub__repo="me/toy"), reward_function=asks_to_stop(6)).train()
    assert hub.repositories == {}


def test_without_a_name_nobody_is_asked(toy_config, hub):
    train(toy_config(num_epochs=1))
    assert hub.requests == []


# ---- before training


@pytest.mark.parametrize(("repo", "token", "message"), [
    ("me/toy", "hf_unknown", r"the hub does not accept the token; set HF_TOKEN"),
    ("me/toy", "", r"needs a token: set HF_TOKEN, or log in"),
    ("me/toy", "hf_reader", r"the token may only read"),
    ("you/toy", TOKEN, r"the token belongs to me, lab, not to 'you'"),
])  # fmt: skip
def test_what_would_prevent_an_upload_is_told_before_training(toy_config, tmp_path, hub, monkeypatch, repo, token,
                                                              message):  # fmt: skip
    hub.add_user("hf_reader", "me", role="read")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"^hub.repo = '{repo}':? {message}") as told:
        AlignPropTrainer(toy_config(hub__repo=repo))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "logs").exists() and hub.repositories == {}


def test_evaluating_asks_nobody(toy_config, hub):
    build_run(toy_config("tiny_evaluate", hub__repo="you/toy"))
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["me/toy", "Me/toy", "LAB/toy"])
def test_what_prevents_nothing_is_let_pass(hub, repo):
    check_hub(repo, private=True)
    assert hub.called("repos/create") == 0


def test_a_fine_grained_token_need_not_tell_all_organisations(hub, monkeypatch):
    hub.add_user("hf_fine", "me", role="fineGrained")
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    check_hub("lab/toy", private=False)


def test_a_token_of_a_login_does_as_well(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    check_hub("me/toy", private=False)
    assert hub.requests[0][2] == TOKEN


def test_nobody_at_that_address(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"^hub.repo = 'me/toy': the hub cannot be reached.*ConnectError") as told:
        check_hub("me/toy", private=False)
    assert "\n" not in str(told.value)


def test_a_hub_that_never_answers(hub, monkeypatch):
    monkeypatch.setattr("alignprop.publish.hub.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"the hub cannot be reached.*ReadTimeout"):
            check_hub("me/toy", private=False)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigError, match=r"the hub cannot be reached: HF_HUB_OFFLINE is set"):
        check_hub("me/toy", private=False)


@pytest.mark.parametrize("token", ["hf_s3cret\x0bx", "hf_s3crét", "hf s3cret", "hf_'s3cret"])
def test_what_cannot_be_a_token_is_neither_sent_nor_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=r"has characters that no token has$") as told:
        check_hub("me/toy", private=False)
    assert "s3" not in str(told.value) and hub.requests == []


def test_a_hub_that_quotes_the_token_is_not_quoted(hub):
    hub.failures, hub.complaint = {("GET", "whoami"): 500}, f"Bearer {TOKEN} is odd"
    with pytest.raises(ConfigError, match=r"the hub answers 500: Bearer … is odd") as told:
        check_hub("me/toy", private=False)
    assert told.value.__cause__ is None and told.value.__suppress_context__


# ---- uploading


def test_the_best_checkpoint_is_uploaded_and_else_the_last(hub, run_folder):
    push(run_folder, "me/toy", private=False)
    assert hub.repositories["me/toy"].files[LORA_FILE] == b"weights of step 2" * 100
    (run_folder / "checkpoints" / "best").unlink()
    push(run_folder, "me/toy", private=False)
    assert hub.repositories["me/toy"].files[LORA_FILE] == b"weights of step 4" * 100
    assert hub.repositories["me/toy"].commits == ["r, optimizer step 2", "r, optimizer step 4"]
    assert not hub.repositories["me/toy"].private


def test_a_whole_denoiser_keeps_its_folder(hub, run_folder):
    for checkpoint in checkpoints_of(run_folder):
        (checkpoint / LORA_FILE).unlink()
        (checkpoint / "denoiser").mkdir()
        (checkpoint / "denoiser" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        (checkpoint / "denoiser" / "diffusion_pytorch_model.safetensors").write_bytes(b"all weights")
    push(run_folder, "me/toy", private=False)
    files = hub.repositories["me/toy"].files
    assert files["denoiser/diffusion_pytorch_model.safetensors"] == b"all weights" and LORA_FILE not in files
    assert json.loads(files["denoiser/config.json"]) == {"_class_name": "UNet2DConditionModel"}
    assert json.loads(files["config.json"])["reward_fn"] == "hps"


@pytest.mark.parametrize("exists", [False, True])
def test_somebody_elses_repository_is_not_touched(hub, run_folder, exists):
    if exists:
        hub.repositories["you/toy"] = Repository(private=False)
    with pytest.raises(ConfigError, match=r"^hub.repo = 'you/toy': the token may not write there: you do not have"):
        push(run_folder, "you/toy", private=False)
    assert not any(repository.files for repository in hub.repositories.values())


@pytest.mark.parametrize("early", [True, False])
def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub, run_folder, early):
    hub.repositories["me/toy"] = Repository(private=False)
    with pytest.raises(ConfigError, match=r"^hub.repo = 'me/toy' exists and is public; make it private"):
        check_hub("me/toy", private=True) if early else push(run_folder, "me/toy", private=True)
    assert hub.repositories["me/toy"].files == {}


def test_a_token_in_the_configuration_is_not_published(hub, run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(config | {"command": f"python mine.py --token={TOKEN}"}))
    with pytest.raises(ConfigError, match=r"contain the token itself$"):
        push(run_folder, "me/toy", private=False)
    assert hub.repositories == {}


def test_a_damaged_checkpoint_is_not_published(hub, toy_config):
    trainer = train(toy_config(num_epochs=1))
    weights = checkpoints_of(trainer.run.folder)[-1] / LORA_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"checkpoint_2' is damaged \({re.escape(LORA_FILE)} has"):
        push(trainer.run.folder, "me/toy", private=False)
    assert hub.requests == []


def test_the_client_gets_its_own_patience_back(hub):
    before = get_session().timeout
    check_hub("me/toy", private=False)
    assert get_session().timeout == before


# ---- names


@pytest.mark.parametrize("name", [
    "me/toy", "Foo-BAR_foo.bar/123", "_a/b_", "a" * 96 + "/" + "b" * 96, "me/" + "b" * 97, "-me/toy", "me/toy-",
    "me/.toy", "me/to--y", "me/to..y", "me/toy.git", "me/toy.gi", "me/té", "me/to y", "a/b/c", "me/toy\n", "/", "me/",
])  # fmt: skip
def test_names_are_allowed_as_the_hub_allows_them(name):
    try:
        validate_repo_id(name)
        allowed = True
    except HFValidationError:
        allowed = False
    assert is_repo_name(name) == allowed
