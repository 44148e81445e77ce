"""A policy onto the hub, by a stand-in of its API: what arrives, what is refused, what is told."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import HfApi
from support import hub as hubs
from support.tiny_run import write_policy

from emor3_jax import push as program
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.errors import RunError, UserError
from emor3_jax.io import card
from emor3_jax.push import push

NAME = "someone/emotions"
CARD = f"""# demo
emor3 infer demo photo.jpg
emor3 serve demo
{card.snippet("demo", "photo.jpg", "which ?", 8)}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that has ended: a policy, and files that are none of the hub's."""
    run = tmp_path_factory.mktemp("push") / "demo"
    write_policy(run / "policy", words=300)
    InferenceSettings().changed(labels="joy,fear").write(run / "policy")
    (run / "policy" / "README.md").write_text(CARD)
    (run / "policy" / "LICENSE").write_text("Apache 2.0")
    (run / "policy" / ".env").write_text("SECRET=1")
    (run / "policy" / "optimizer.pt").write_bytes(b"pickle")
    return run


@pytest.fixture
def hub(monkeypatch):
    # The other way, Xet, sends chunks by a library that is no HTTP to stand in for.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hubs.running() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.address, token=hubs.WRITES)


def test_a_policy_arrives_whole(run, hub, api):
    said = []
    assert push(run, NAME, api=api, say=said.append) == f"{hub.address}/{NAME}"
    files, policy = hub.files[NAME]["main"], run / "policy"
    kept = {path.name for path in policy.iterdir()} - {".env", "optimizer.pt"}
    assert set(files) == kept
    assert said[0] == "left out: .env, optimizer.pt"
    for name in kept - {"README.md"}:
        assert files[name] == (policy / name).read_bytes(), name
    weights = (policy / "model.safetensors").read_bytes()
    # As a large file, checked by its sum; the rest within the commit.
    assert hub.objects == {hashlib.sha256(weights).hexdigest(): weights}
    assert hub.commits == [(NAME, "main", "Upload the policy demo")]
    assert NAME not in hub.private


def test_the_card_asks_by_the_name_on_the_hub(run, hub, api):
    push(run / "policy", NAME, api=api, message="mine")
    told = hub.files[NAME]["main"]["README.md"].decode()
    assert f"emor3 infer {NAME} photo.jpg\nemor3 serve {NAME}\n" in told
    assert f'folder, image = "{NAME}", Image.open("photo.jpg")' in told
    assert (run / "policy" / "README.md").read_text() == CARD
    assert hub.commits[0][2] == "mine"
    other = "# mine\nfolder = 3, emor3 infer demo\n"
    assert program.renamed(other, NAME) == other


def test_a_second_time_sends_what_is_new(run, hub, api, tmp_path):
    shutil.copytree(run / "policy", tmp_path / "copy")
    push(tmp_path / "copy", NAME, api=api)
    push(tmp_path / "copy", NAME, api=api)
    assert len(hub.commits) == 1
    (tmp_path / "copy" / "LICENSE").write_text("MIT")
    push(tmp_path / "copy", NAME, api=api)
    assert len(hub.commits) == 2 and hub.files[NAME]["main"]["LICENSE"] == b"MIT"
    assert sum(call.startswith("PUT") for call in hub.calls) == 1


def test_an_upload_that_breaks_off_goes_on(run, hub, api):
    # In the middle of the weights once, which is tried again; then in each try of a run.
    hub.failing["PUT", "/lfs/"] = [0]
    push(run, NAME, api=api)
    assert sum(call.startswith("PUT") for call in hub.calls) == 2
    hub.failing["POST", "/commit/"] = [503]
    with pytest.raises(RunError, match=r"answers 503 .*uploaded is not sent twice"):
        push(run, "someone/second", api=api)
    assert hub.files["someone/second"]["main"] == {}
    push(run, "someone/second", api=api)
    first, second = (hub.files[name]["main"] for name in (NAME, "someone/second"))
    assert {**second, "README.md": first["README.md"]} == first
    # The weights were there already.
    assert sum(call.startswith("PUT") for call in hub.calls) == 2


def test_large_folders_go_in_the_commits_of_the_other_way_too(run, hub, api, monkeypatch):
    """The pipeline of huggingface_hub for Xet; no file of it is large enough for Xet itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.large = (".none",)
    push(run, NAME, api=api)
    weights = (run / "policy" / "model.safetensors").read_bytes()
    assert hub.files[NAME]["main"]["model.safetensors"] == weights


def test_private_and_a_branch(run, hub, api):
    address = push(run, NAME, api=api, private=True, revision="v2")
    assert address == f"{hub.address}/{NAME}/tree/v2"
    assert hub.private == {NAME} and not hub.files[NAME]["main"]
    assert "config.json" in hub.files[NAME]["v2"]
    push(run, NAME, api=api, private=True, revision="v2")
    hub.private.clear()
    with pytest.raises(UserError, match="--private, but this repository is there and public"):
        push(run, NAME, api=api, private=True)
    with pytest.raises(UserError, match=r"revision='refs/pr/7': .* has no such place"):
        push(run, NAME, api=api, revision="refs/pr/7")


@pytest.mark.parametrize("name", ["emotions", "a/b/c", "some one/x", "someone/x--y", "/x", ""])
def test_a_name_that_is_none_is_refused_first(name, hub, api):
    with pytest.raises(UserError, match=r"^name='.*': must be owner/name"):
        push("nowhere", name, api=api)
    assert hub.calls == []


def test_what_would_not_load_is_refused_before_anything_is_sent(run, hub, api, tmp_path):
    with pytest.raises(UserError, match="there is no policy"):
        push(tmp_path / "nowhere", NAME, api=api)
    with pytest.raises(UserError, match="holds neither a policy"):
        push(tmp_path, NAME, api=api)
    with pytest.raises(UserError, match="is on the hub; give a run"):
        push("Qwen/Qwen2.5-VL-3B-Instruct", NAME, api=api)
    for file in ("model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        folder = tmp_path / file
        shutil.copytree(run / "policy", folder)
        (folder / file).unlink()
        with pytest.raises((UserError, FileNotFoundError), match=file.split(".")[0]):
            push(folder, NAME, api=api)
    folder = tmp_path / "wide"
    shutil.copytree(run / "policy", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    with pytest.raises(UserError, match=r"tensor model.layers.0.mlp\S+ has shape"):
        push(folder, NAME, api=api)
    assert hub.calls == []


def test_what_vllm_would_not_load_is_told(run, hub, api, tmp_path):
    shutil.copytree(run / "policy", tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    said = []
    push(tmp_path / "copy", NAME, api=api, say=said.append)
    assert said[0].startswith("vLLM would not load this folder: chat template='{{ messages }}'")


def test_tokens(run, hub, monkeypatch):
    def told(token: str) -> str:
        with pytest.raises(UserError) as refused:
            push(run, NAME, api=HfApi(endpoint=hub.address, token=token))
        return str(refused.value)

    assert told("hf_wrong").startswith(f"token: {hub.address} does not accept it (Invalid user")
    assert told(hubs.READS).startswith(f"name='{NAME}': the token may not write there (You may")
    hub.files[NAME] = {"main": {}}  # then it is there, and only its files are refused
    assert "the token may not write there (Forbidden: this token" in told(hubs.READS)
    with pytest.raises(UserError, match="name='other/x': the token may not write there"):
        push(run, "other/x", api=HfApi(endpoint=hub.address, token=hubs.WRITES))
    hub.calls.clear()
    monkeypatch.setattr("emor3_jax.io.upload._stored_token", lambda: None)
    with pytest.raises(UserError, match=r"token: there is none for \S+; log in by `hf auth login`"):
        push(run, NAME, api=HfApi(endpoint=hub.address))
    assert hub.calls == []


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, UserError, "the hub refuses the files (made to fail with 400); mend them"),
        (402, UserError, "the hub asks for payment"),
        (404, UserError, "has no such place, or does not show it to this token"),
        (409, RunError, "another upload changed it meanwhile"),
        (412, RunError, "another upload changed it meanwhile"),
        (413, UserError, "the hub has no room for so much"),
        (429, RunError, "answers 429 (made to fail with 429); try again later"),
        (500, RunError, "answers 500"),
        (0, RunError, "cannot be reached, or broke off"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(run, hub, api, status, kind, told):
    hub.failing["POST", "/commit/"] = [status]
    with pytest.raises(kind) as error:
        push(run, NAME, api=api)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_large_files_that_never_arrive(run, hub, api):
    hub.failing["PUT", "/lfs/"] = [500] * 20
    with pytest.raises(RunError, match="answers 500"):
        push(run, NAME, api=api)
    assert hub.files[NAME]["main"] == {}


def test_no_network(run, hub, monkeypatch):
    api = HfApi(endpoint="http://127.0.0.1:9", token=hubs.WRITES)
    with pytest.raises(RunError, match=r"^http://127.0.0.1:9 cannot be reached"):
        push(run, NAME, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import _http

    _http.close_session()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(run, NAME, api=api)
    _http.close_session()
