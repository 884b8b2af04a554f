"""Model cards, and pushing an exported folder to a hub: a real HTTP server stands in for the Hugging Face Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import runpy
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from l2e_ds.cli import main
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.data.tokenizer import train_tokenizer
from l2e_ds.distributed.launch import free_port
from l2e_ds.run_directory import manifest
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.run_directory.results import FILE

STEP, ROWS = 20, 300
NETWORK = {"vocab_size": ROWS, "num_layers": 3, "hidden_size": 16, "num_heads": 2}
HOSTILE = "a|b`c`<script>*\n# heading"


def make_run(run: Path, changes: dict | None = None, steps: tuple[int, ...] = (STEP,)) -> Path:
    """A run directory with checkpoints, as a run under ZeRO-0 leaves it, without training."""
    content = {
        "model": {"name": "pythia-14m", **NETWORK},
        "data": {"source": "text", "path": "/home/somebody/secret/corpus", "train_tokenizer": ROWS},
        "optimizer": {"peak_learning_rate": 1e-3},
        "training": {"steps": 40, "global_batch": 8, "run_directory": str(run), "precision": "fp32"},
    }
    for section, values in (changes or {}).items():
        content[section] = values if section == "model" else content.get(section, {}) | values
    config = checked(RunConfig, content, "test").model_dump(mode="json")
    hf_config = GPTNeoXConfig(
        vocab_size=ROWS, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    hf_config.save_pretrained(run / "model")
    for step in steps:
        torch.manual_seed(step)
        folder = run / "checkpoints" / f"step{step:08d}"
        folder.mkdir(parents=True)
        weights = folder / "mp_rank_00_model_states.pt"
        torch.save({"module": AutoModelForCausalLM.from_config(hf_config).state_dict()}, weights)
        identity = {"zero_stage": 0, "precision": "fp32", "ranks": 2, "layers": [1, 2]}
        state = {"train": {"step": step, "tokens": 256 * step}, "identity": identity, "config": config}
        (folder / "state.json").write_text(json.dumps(state))
        manifest.write_manifest(folder, manifest.flush_and_describe(folder, [weights, folder / "state.json"]))
    start = {"train_tokens": 2560, "versions": {"torch": HOSTILE}, "git": {"commit": "0123abc", "changed": False}}
    figures = {"layer1/mean_s": 0.5, "layer1/selected_score": 11.0, "layer1/tau": 6.0}
    lines = [
        {"kind": "start", "step": 0, **start},
        {"kind": "train", "step": 15, "observed_share": 0.0213, **figures},
        {"kind": "evaluation", "step": 20, "held_out_loss": 5.1234},
        {"kind": "start", "step": 20, "git": {"commit": "4567def", "changed": False}},  # of what follows
        {"kind": "train", "step": 25, "observed_share": 0.9},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, value, precision in ((10, 0.1, "fp32"), (STEP, 0.4321, "fp32"), (STEP, 0.5, "bf16")):
        metric = {"value": value, "stderr": 0.01, "higher_is_better": True}
        task = {"samples": 100, "cut": 0, "num_fewshot": 5, "version": 1.0, "part_of": None, "metrics": {"acc": metric}}
        append_line(run / FILE, {"step": step, "limit": 100, "precision": precision, "tasks": {"arc_easy": task}})
    return run


def exported(run: Path, output: Path, *options: str) -> tuple[ModelCard, str]:
    """The card, and its text."""
    assert main(["export", str(run), "--output", str(output), *options]) == 0
    card = ModelCard.load(output / "README.md")
    return card, card.text


# --- the card ----------------------------------------------------------------------------------------------------


def test_card_of_a_step(tmp_path):
    """Figures are those at or before the exported step; nothing tells where the run was."""
    card, text = exported(make_run(tmp_path / "my_run"), tmp_path / "out", "--license", "apache-2.0")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.tags == ["l2e-ds", "l2e", "pythia", "gpt_neox"]
    assert card.data.base_model is None and card.data.datasets is None
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("arc_easy", "acc", 0.4321)
    assert result.dataset_args == {"num_fewshot": 5, "limit": 100}
    for words in (
        "# my\\_run",
        "step 20 (5,120 tokens)",
        "observed share, step 15 | 2.13%",
        "mean S 0.5, MS of the selected 11, tau 6",
        "Held-out LM loss at step 20: 5.1234",
        "| arc\\_easy | 5 | acc | 0.4321 | 0.0100 | 100 |",
        "data | text: corpus |",
        "2,560, read 2 times",
        "steps | 20 of 40",
        "commit 0123abc",
        "cut to their first documents",
        "apache-2.0",
        r"torch a\|b\`c\`\<script\>\* \# heading",
    ):
        assert words in text, f"{words} is not in\n{text}"
    assert "secret" not in str(card) and str(tmp_path) not in str(card)


def test_card_says_that_no_license_was_chosen(tmp_path):
    card, text = exported(make_run(tmp_path / "run", {"inhibition": {"method": "none"}}), tmp_path / "out")
    assert card.data.license is None and "No license was chosen" in text
    assert "without inhibition" in text and "target share" not in text
    assert card.data.tags == ["l2e-ds", "pythia", "gpt_neox"]


@pytest.mark.parametrize(
    ("pretrained", "base_model"), [("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"), ("/home/me/secret/mine", None)]
)
def test_card_of_a_model_that_was_trained_further(pretrained, base_model, tmp_path):
    """A model of the hub is named as its base; of a folder only its own name is told."""
    data = {"path": "owner/texts", "source": "hub", "train_tokenizer": None, "tokenizer": pretrained}
    run = make_run(tmp_path / "run", {"model": {"pretrained": pretrained}, "data": data})
    card, text = exported(run, tmp_path / "out")
    assert card.data.base_model == base_model and card.data.datasets == ["owner/texts"]
    assert f"Further trained from {base_model or 'mine'} " in text and "secret" not in str(card)


def test_card_code_loads_the_model(tmp_path, monkeypatch, capsys):
    """The code runs as it is in the card, with and without a tokenizer."""
    run = make_run(tmp_path / "run")
    _, text = exported(run, tmp_path / "bare")
    assert "had no tokenizer" in text
    texts = iter(["The old pilot counted the lights along the coast."] * 3)
    train_tokenizer(texts, ROWS).save_pretrained(run / "tokenizer")
    _, with_tokenizer = exported(run, tmp_path / "whole")
    for folder, card in (("bare", text), ("whole", with_tokenizer)):
        monkeypatch.chdir(tmp_path / folder)
        code = tmp_path / f"{folder}.py"
        code.write_text(card.split("```python\n")[1].split("```")[0])
        capsys.readouterr()
        assert runpy.run_path(str(code))["model"].config.vocab_size == ROWS
        assert capsys.readouterr().out.startswith("The") == (folder == "whole")


# --- the hub -----------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks for when folders are uploaded, of one repository, `me/model`.

    refuses: the path that is answered with 403; branches: the files of each; commits: the branch of each.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses = ""
        self.tokens: set[str] = set()
        self.created: list[dict] = []
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.commits: list[str] = []

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


MODEL = "/api/models/me/model"


def listed(path: str, content: bytes) -> dict:
    """How the hub lists a file: by git's id, and one in large-file storage also by its SHA-256."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith(".safetensors"):
        file["oid"] = "0" * 40  # of the pointer
        file["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return file


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if path.startswith(("/api/whoami", "/api/repos/", "/api/models/")):  # the others are open to all
            hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.refuses and path.endswith(hub.refuses):
            self._send(403, {"error": "forbidden"})
        elif path == "/api/whoami-v2":
            self._send(200, {"name": "me", "type": "user"})
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._send(200, {"url": f"{hub.address}/me/{json.loads(body)['name']}"})
        elif path.startswith(f"{MODEL}/preupload/"):
            given = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = [{"path": file["path"], **given} for file in json.loads(body)["files"]]
            self._send(200, {"files": files})
        elif path.startswith(f"{MODEL}/commit/"):
            branch = path.rpartition("/")[2]
            hub.commits.append(branch)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.branches[branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del hub.branches[branch][line["value"]["path"]]
            self._send(200, {"commitUrl": f"{hub.address}/me/model/commit/1", "commitOid": "1"})
        elif path == f"{MODEL}/refs":
            names = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "1"} for name in hub.branches]
            self._send(200, {"branches": names, "converts": [], "tags": []})
        elif path.startswith(f"{MODEL}/branch/"):
            hub.branches[path.rpartition("/")[2]] = dict(hub.files)
            self._send(200, {})
        elif path.startswith(f"{MODEL}/tree/"):
            self._send(200, [listed(*file) for file in hub.branches[path.rpartition("/")[2]].items()])
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        else:
            self._send(404, {"error": f"the test's hub does not know {self.command} {path}"})

    def _send(self, status: int, content: dict | list) -> None:
        self.send_response(status)
        data = json.dumps(content).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push(hub, tmp_path, capsys):
    """Exactly the exported files arrive, none of them a pickle, with the token of the environment."""
    run, output = make_run(tmp_path / "run"), tmp_path / "out"
    _, text = exported(run, output, "--push", "me/model", "--private")
    assert f"pushed to {hub.address}/me/model" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in output.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()
    assert not any(name.endswith((".pt", ".bin", ".pkl")) for name in hub.files)
    assert (hub.created[0]["name"], hub.created[0]["visibility"]) == ("model", "private")
    assert hub.tokens == {"Bearer hf_of_the_test"}
    assert 'where = "me/model"' in text and text.lstrip().startswith("# model")


def refused(capsys, *arguments: object) -> str:
    """The one line with which `l2e-ds export` refuses, exit code 2."""
    assert main(["export", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1, line
    return line


def test_an_upload_that_fails_leaves_the_folder(hub, tmp_path, capsys):
    hub.refuses = "/api/models/me/model/commit/main"
    output = tmp_path / "out"
    line = refused(capsys, make_run(tmp_path / "run"), "--output", output, "--push", "me/model")
    assert "answers 403: the token may not do this" in line
    assert line.endswith(f"push it by: hf upload me/model {output}")
    assert (output / "model.safetensors").is_file() and not hub.files


ALL = ("--push", "me/model", "--all-checkpoints")


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of temporary files, in which none of ours may be in the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert all(path.name.startswith("torchinductor_") for path in folder.iterdir())


def test_push_all_checkpoints(hub, scratch, tmp_path, capsys):
    """Each step is a branch with its own weights and card, and the last is main, which an earlier push had filled."""
    hub.files.update({".gitattributes": b"", "model-00001-of-00002.safetensors": b"old", "config.json": b"{}"})
    run = make_run(tmp_path / "run", steps=(0, 10, 20))
    assert main(["export", str(run), *ALL, "--private"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("pushed step0 (1 of 3)", "pushed step10 (2 of 3)", "pushed step20 (3 of 3)", "pushed main, which is step 20"),
        f"3 checkpoints pushed to {hub.address}/me/model; 0 passed over, which were there with the same content",
    ]
    assert hub.branches.keys() == {"main", "step0", "step10", "step20"}
    assert hub.created[0]["visibility"] == "private" and hub.tokens == {"Bearer hf_of_the_test"}
    for branch, content in hub.branches.items():
        assert {"README.md", "config.json", "model.safetensors", "l2e_run.yaml", ".gitattributes"} <= content.keys()
        assert not any(name.endswith((".pt", ".bin", ".pkl", "00002.safetensors")) for name in content)
        step = int(branch.removeprefix("step")) if branch != "main" else 20
        assert yaml.safe_load(content["l2e_run.yaml"])["step"] == step
        card = content["README.md"].decode()
        load = "from_pretrained(where)" if branch == "main" else f'from_pretrained(where, revision="{branch}")'
        assert load in card and f"This is step {step} " in card
        assert ("named as `revision`: step0, step10, step20." in card) == (branch == "main")
    weights = {branch: content["model.safetensors"] for branch, content in hub.branches.items()}
    assert weights["main"] == weights["step20"] and len(set(weights.values())) == 3


def test_push_all_checkpoints_resumes(hub, scratch, tmp_path, capsys):
    """What is there with the same content is passed over, and nothing else."""
    run = make_run(tmp_path / "run", steps=(0, 10, 20))
    hub.refuses = "/commit/step10"
    assert main(["export", str(run), *ALL]) == 2
    said = capsys.readouterr()
    assert said.out == "pushed step0 (1 of 3)\n"
    assert said.err.count("\n") == 1 and "answers 403" in said.err
    assert said.err.endswith("the token may not do this; the same command resumes\n")
    assert hub.commits == ["step0"]

    def again() -> str:
        hub.refuses = ""
        hub.commits.clear()
        assert main(["export", str(run), *ALL]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert again().startswith("2 checkpoints pushed") and hub.commits == ["step10", "step20", "main"]
    whole = {branch: dict(content) for branch, content in hub.branches.items()}
    assert "0 checkpoints pushed" in (line := again()) and "; 3 passed over" in line and not hub.commits
    hub.branches["step0"]["model.safetensors"] += b"x"  # in large-file storage
    hub.branches["step10"]["config.json"] += b"x"
    hub.branches["step20"]["more"] = b""
    del hub.branches["main"]["l2e_run.yaml"]
    assert "3 checkpoints pushed" in again() and hub.commits == ["step0", "step10", "step20", "main"]
    assert hub.branches == whole


def test_a_damaged_checkpoint_is_not_pushed(hub, scratch, tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(0, 10, 20))
    for step in (0, 20):
        weights = run / f"checkpoints/step{step:08d}/mp_rank_00_model_states.pt"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["export", str(run), *ALL]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 3 and "step00000000: mp_rank_00_model_states.pt" in lines[0] and "not pushed" in lines[1]
    assert lines[2].endswith("damaged and not pushed: step00000000, step00000020")
    assert said.out.startswith("pushed step10 (2 of 3)\npushed main, which is step 10\n1 checkpoints pushed")
    assert hub.branches.keys() == {"main", "step10"}


def test_all_checkpoints_of_what(hub, scratch, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "--all-checkpoints: goes with --push" in refused(capsys, run, "--all-checkpoints")
    assert "--output: does not go with --all-checkpoints" in refused(capsys, run, *ALL, "--output", tmp_path / "out")
    assert "--step: does not go with --all-checkpoints" in refused(capsys, run, *ALL, "--step", 20)
    assert "is not a run directory" in refused(capsys, run / f"checkpoints/step{STEP:08d}", *ALL)
    assert "has no checkpoint" in refused(capsys, tmp_path / "empty", *ALL)
    assert "--license: got" in refused(capsys, run, *ALL, "--license", "My own")
    assert "--output: is required" in refused(capsys, run)
    hub.refuses = "/api/repos/create"
    assert refused(capsys, run, *ALL).endswith("the token may not do this; the same command resumes")
    assert not hub.commits


def test_what_is_known_before_the_export(hub, tmp_path, monkeypatch, capsys):
    """A wrong name, a refused token, no token, no network, offline mode: one line each, and nothing is written."""
    output = tmp_path / "out"
    arguments = (tmp_path / "nowhere", "--output", output)
    assert "--push: Repo id must" in refused(capsys, *arguments, "--push", "a/b/c")
    assert "--private: goes with --push" in refused(capsys, *arguments, "--private")
    hub.refuses = "/api/whoami-v2"
    assert "answers 403" in refused(capsys, *arguments, "--push", "me/model")
    closed = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert f"--push: cannot reach {closed}" in refused(capsys, *arguments, "--push", "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, *arguments, "--push", "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "there is no token; run `hf auth login`" in refused(capsys, *arguments, "--push", "me/model")
    assert not output.exists()


def test_license_is_an_id(tmp_path, capsys):
    line = refused(capsys, make_run(tmp_path / "run"), "--output", tmp_path / "out", "--license", "My own")
    assert "--license: got 'My own', give an id" in line and not (tmp_path / "out").exists()
