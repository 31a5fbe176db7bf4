"""Publishing, with the real client of the hub against a small hub on this machine."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
from contextlib import redirect_stdout

import huggingface_hub
import peft
import pytest
import torch
import transformers

import qwenft as qf
from qwenft.models.publish import files_of_model, terms_of

from .helpers import relative
from .hub import TOKEN, Hub, served

# Of the client's own upload, where it sends a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four", "five", "six")
]
ADAPTERS = {"lora": qf.AdapterSpec.lora(rank=4), "full": qf.AdapterSpec.full()}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The client, logged in with a token alone, with uploads that a small hub understands."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(monkeypatch):
    """A hub, and the client's address of it."""
    with served(Hub()) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture(scope="module")
def runs(dense_checkpoint, tmp_path_factory):
    """A finished run of each kind."""
    return {kind: trained(dense_checkpoint, kind, tmp_path_factory.mktemp(kind) / "run") for kind in ADAPTERS}


def trained(checkpoint, kind, folder, **options):
    return (
        qf.Recipe(
            qf.ModelSpec(checkpoint, dtype="float32"),
            qf.DataSpec.messages(CHATS).with_max_length(64).pack(),
            ADAPTERS[kind],
            training=qf.TrainingSpec(learning_rate=1e-2, max_steps=3, warmup_ratio=0.0),
        )
        .compile()
        .train(folder, verbose=0, **options)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_is_published_in_one_commit(hub, runs, dense_checkpoint):
    """The hub has the adapter's weights, the tokenizer, the card and the curve, to the byte, in a private repository."""
    run = runs["lora"]
    before = contents(run.folder)
    url = run.push("me/bot")
    received = hub.files("me/bot")
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png", *TOKENIZER}
    assert hub.commits == [("me/bot", "main", "Run of 3 steps with qwenft", names)]
    assert url == f"{hub.endpoint}/me/bot/commit/{1:040x}"
    assert hub.private == {"me/bot": True}
    assert received.keys() == names | {".gitattributes"}
    assert received["adapter_model.safetensors"] == (run.adapter_path / "adapter_model.safetensors").read_bytes()
    assert all(received[name] == (dense_checkpoint / name).read_bytes() for name in TOKENIZER)
    assert received["README.md"].decode() == run.card("me/bot")
    assert received["loss.png"].startswith(b"\x89PNG")
    assert contents(run.folder) == before


def test_no_path_of_this_machine_is_published(hub, runs, dense_checkpoint):
    """The adapter's config names the base by its folder alone, and is else what was saved; no text holds a path."""
    run = runs["lora"]
    run.push("me/bot")
    received = hub.files("me/bot")
    config, saved = (
        json.loads(content)
        for content in (received["adapter_config.json"], (run.adapter_path / "adapter_config.json").read_bytes())
    )
    assert saved.pop("base_model_name_or_path") == str(dense_checkpoint)
    assert config.pop("base_model_name_or_path") == "checkpoint"
    assert config == saved
    assert not [name for name, content in received.items() if str(dense_checkpoint.parent).encode() in content]


def test_without_matplotlib_the_card_has_bars_alone(hub, runs, monkeypatch):
    """No picture is published then, and the card speaks of none."""
    monkeypatch.setattr("qwenft.run.find_spec", lambda _: None)
    runs["lora"].push("me/bot")
    assert "loss.png" not in hub.files("me/bot")
    assert b"![" not in hub.files("me/bot")["README.md"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.usefixtures("without_fla")
def test_stock_peft_loads_what_was_received(hub, runs, dense_checkpoint, tmp_path):
    """The received folder, put by stock peft on the stock base, gives the run's logits."""
    run = runs["lora"]
    run.push("me/bot")
    base = transformers.AutoModelForImageTextToText.from_pretrained(dense_checkpoint)
    model = peft.PeftModel.from_pretrained(base, received(hub, "me/bot", tmp_path)).eval()
    assert relative(*logits(run, model)) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.usefixtures("without_fla")
def test_the_cards_code_runs(hub, runs, dense_checkpoint, tmp_path, merged):
    """The code of the card loads what was received, and the model answers."""
    run = runs["lora"]
    run.push("me/bot", merged=merged)
    card = hub.files("me/bot")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace('"me/bot"', repr(str(received(hub, "me/bot", tmp_path))))
    code = code.replace('"checkpoint"', repr(str(dense_checkpoint))).replace("=256", "=4")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})  # noqa: S102 - it is our own
    assert printed.getvalue().strip() == run.generate("Hello!", max_new_tokens=4).strip()


@pytest.mark.usefixtures("without_fla")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_whole_model_is_published(hub, runs, tmp_path, kind):
    """A merged adapter is exported beside the run once; a fully trained model is taken as it lies there."""
    run = runs[kind]
    run.push("me/whole", merged=kind == "lora")
    folder = run.folder / ("merged" if kind == "lora" else "model")
    received_files = hub.files("me/whole")
    for path in folder.iterdir():
        assert received_files[path.name] == path.read_bytes()
    assert received_files.keys() == {path.name for path in folder.iterdir()} | {
        "README.md",
        "loss.png",
        ".gitattributes",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(received(hub, "me/whole", tmp_path)).eval()
    assert relative(*logits(run, model)) < 1e-5
    changed = folder.stat().st_mtime_ns
    run.push("me/again", merged=True, private=False)
    assert folder.stat().st_mtime_ns == changed
    assert not hub.private["me/again"]


def logits(run, model):
    """The run's logits on a batch, and another model's, document by document."""
    batch = next(run.prepared.batches())[0]
    run.prepared.model.eval()
    with torch.no_grad():
        theirs = [model(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(batch.layout.lengths)]
        return run.prepared.logits(batch), torch.cat(theirs)


def received(hub, repo_id, folder):
    """A folder of what the hub has."""
    for name, content in hub.files(repo_id).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_branch_is_made_where_it_is_not_there(hub, runs):
    """With a revision the commit goes to that branch alone, and the card loads from it."""
    for _ in range(2):
        runs["lora"].push("me/bot", revision="v2")
    assert [branch for _, branch, *_ in hub.commits] == ["v2", "v2"]
    assert hub.files("me/bot").keys() == {".gitattributes"}
    assert 'from_pretrained(base, "me/bot", revision="v2")' in hub.files("me/bot", "v2")["README.md"].decode()


def test_a_second_push_leaves_other_files(hub, runs):
    """What else a repository holds stays, but weights that would be loaded instead are an error."""
    run = runs["lora"]
    run.push("me/bot")
    hub.files("me/bot")["notes.txt"] = b"mine"
    run.push("me/bot")
    assert hub.files("me/bot")["notes.txt"] == b"mine"
    with pytest.raises(
        qf.CheckpointError, match=r"me/bot holds adapter_config.json, adapter_model.safetensors, bes"
    ):
        run.push("me/bot", merged=True)
    assert len(hub.commits) == 2


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_other_visibility_is_refused(hub, runs, private):
    """What is to be private is not written where all can read it, nor the other way round."""
    runs["lora"].push("me/bot", private=not private)
    words = ("public", "private") if private else ("private", "public")
    with pytest.raises(
        qf.CheckpointError, match=rf"me/bot is {words[0]} already, and {words[1]} was .*\n.*{not private}"
    ):
        runs["lora"].push("me/bot", private=private)
    assert len(hub.commits) == 1


def test_an_unfinished_run_is_refused(hub, dense_checkpoint, tmp_path):
    """A run that was interrupted has no result, and says how it gets one; the hub is not asked."""

    def stop(_):
        signal.raise_signal(signal.SIGINT)

    run = trained(dense_checkpoint, "lora", tmp_path / "run", on_step=stop)
    for ask in (lambda: run.push("me/bot"), lambda: run.push("me/bot", merged=True), run.card):
        with pytest.raises(qf.CheckpointError, match=r"no adapter: the run is interrupted\n.*plan.train\("):
            ask()
    assert hub.requests == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "modeling.py", "folder"])
def test_files_of_other_kinds_are_refused(tmp_path, name):
    """A file that could run code, or is no part of a model, is an error; hidden files are no part of it."""
    for fine in ("model.safetensors", "LICENSE", ".gitattributes"):
        (tmp_path / fine).touch()
    assert files_of_model(tmp_path).keys() == {"model.safetensors", "LICENSE"}
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    with pytest.raises(
        qf.CheckpointError, match=rf"holds {name}; what is published is .safetensors, .*\n  Fix: move"
    ):
        files_of_model(tmp_path)


def test_without_a_token_the_error_says_how_to_log_in(hub, runs, monkeypatch):
    """401 names both ways to give a token."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        qf.CheckpointError, match=r"nothing here has changed: 401, Invalid user.*\n.*`hf auth login`.*HF_TOKEN"
    ):
        runs["lora"].push("me/bot")
    assert hub.branches == {}


def test_without_the_right_the_error_names_the_owner(hub, runs):
    """403 names whose repositories the token may not write to."""
    with pytest.raises(
        qf.CheckpointError, match=r"403, You don't have the rights .*\n  Fix: a token that may write to other"
    ):
        runs["lora"].push("other/bot")
    assert hub.branches == {}


@pytest.mark.parametrize("repo_id", ["bot", "me/my bot", "me/bots/bot", "me/bot.git"])
def test_a_misspelt_id_is_refused(hub, runs, repo_id):
    """An id that the hub cannot have is an error before anything is asked."""
    with pytest.raises(qf.CheckpointError, match=r'Fix: an id such as "your-name/support-bot"') as caught:
        runs["lora"].push(repo_id)
    assert caught.value.path == repo_id
    assert hub.requests == []


def test_an_unreachable_hub_is_an_error(runs, monkeypatch):
    """Where nobody answers, the error says so and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            qf.CheckpointError, match=r"me/bot was not published, .*ConnectError.*\n  Fix: check the network"
        ):
            runs["lora"].push("me/bot")


def test_an_upload_that_fails_is_an_error(hub, runs, monkeypatch):
    """What the hub refuses while files are uploaded is told, and there is no commit."""
    answer = hub.answer

    def failing(method, path, body, headers):
        return (403, {"error": "quota exceeded"}) if method == "PUT" else answer(method, path, body, headers)

    monkeypatch.setattr(hub, "answer", failing)
    with pytest.raises(qf.CheckpointError, match=r"me/bot was not published, .*403, quota exceeded"):
        runs["lora"].push("me/bot")
    assert hub.commits == []


def test_metadata_that_the_hub_refuses_are_an_error(hub, runs, monkeypatch):
    """What is wrong with the card is told, and there is no commit."""
    monkeypatch.setattr("qwenft.models.publish.terms_of", lambda _: {"license": "Terms of ours"})
    with pytest.raises(qf.CheckpointError, match=r'Invalid metadata in README.md.\n- "license" is not valid$'):
        runs["lora"].push("me/bot")
    assert hub.commits == []


def test_the_bases_license_is_passed_on(tmp_path):
    """The license that the base's own card states is known; without a card none is."""
    assert terms_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    )
    assert terms_of(tmp_path) == {"license": "apache-2.0", "license_link": "LICENSE"}
