"""Every command in README and docs, as it stands there, in a folder that has what they name.

Commands that cannot run here are named in HTML comments directly above their block, which readers do not see:

    <!-- cluster: launch/deepspeed.sh --hostfile; l2e-ds submit -->

excludes the commands of the next block that begin with these words; without words, `<!-- hours -->` excludes the whole
block. The first word says what is missing: `cluster`, `network` (a hub or pip), or `hours` (tests run smaller sizes).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from l2e_ds.cli import main
from tests.integration.conftest import SENTENCES
from tests.processes import REPOSITORY, environment, finish

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (?:cluster|network|hours)(?:: ([^\n]+))? -->\n+")
BLOCK = re.compile(r"((?:<!-- (?:cluster|network|hours)\b[^\n]*\n+)*)^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
# in a test of their own, which calls them as they stand
ELSEWHERE = {
    "launch/quickstart.sh": "tests/integration/test_quickstart.py",
    "launch/test.sh": ".ci/run",
}


STUDY = {
    "base": "RUN.yaml",
    "directory": "studies/main",
    "factors": {"method": {"none": {"inhibition.method": "none"}, "l2e": {"inhibition.method": "l2e"}}},
    "baseline": {"method": "none"},
}


def blocks() -> list[tuple[str, list[str], list[str]]]:
    """Return page, excluded beginnings ("" excludes all), and commands of each bash block.

    A command may continue on the next line after a backslash.
    """
    found = []
    for page in PAGES:
        for marks, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            excluded = [words for names in MARK.findall(marks) for words in names.split("; ")]
            lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
            commands = [" ".join(shlex.split(line, comments=True)) for line in lines]
            found.append((str(page.relative_to(REPOSITORY)), excluded, commands))
    return found


def commands() -> list[tuple[str, str]]:
    """Return first page and text of each command that is not excluded."""
    pages: dict[str, str] = {}
    for page, excluded, block in blocks():
        for command in block:
            if not any(command.startswith(words) for words in excluded):
                pages.setdefault(command, page)
    return [(page, command) for command, page in pages.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the files and runs that the pages' commands name."""
    root = tmp_path_factory.mktemp("docs")
    here = Path.cwd()
    os.chdir(root)
    try:
        _write_files(root)
        (root / "STUDY.yaml").write_text(yaml.safe_dump(STUDY))
        run_command(
            ["l2e-ds", "study", "STUDY.yaml", "training.micro_batch=32", "checkpoint.every=2", "--devices", "2"]
        )
        for name in ("RUN_DIRECTORY", "RUN", "runs/l2e", "runs/memel", "runs/quickstart"):
            shutil.copytree("studies/main/runs/l2e-seed1234", name)
        shutil.copytree("studies/main/runs/none-seed1234", "runs/none")
        assert main(["export", "RUN_DIRECTORY", "--output", "MODEL"]) == 0
        shutil.copy("MODEL/tokenizer.json", "NAME.json")
        for name in ("20B_tokenizer.json", "tokenizer.json"):
            shutil.copy("MODEL/tokenizer.json", name)
        assert main(["tokenize", "corpus", "--output", "PREFIX", "--tokenizer", "tokenizer.json"]) == 0
    finally:
        os.chdir(here)
    return root


def run_command(words: list[str]) -> None:
    """In a process of its own: DeepSpeed makes engines in one process group only."""
    if words[0] == "l2e-ds":
        codes, said = finish("-m", "l2e_ds.cli", *words[1:])
        assert codes == [0], said[-3000:]
        return
    words = [str(REPOSITORY / words[0]) if "/" in words[0] else words[0], *words[1:]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def _write_files(root: Path) -> None:
    texts = ["\n".join(SENTENCES[(i + k) % 5] + f" {i * k}" for k in range(40)) for i in range(60)]
    for name in ("corpus", "TEXT"):
        (root / name).mkdir()
        for index, text in enumerate(texts):
            (root / name / f"{index:02d}.txt").write_text(text)
    lines = [{"text": text, "feature": ("odd", "even")[i % 2]} for i, text in enumerate(texts)]
    for name in ("FILE", "code.jsonl"):
        (root / name).with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("launch", "ds_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    _write_task(root)
    run = {
        "model": {"name": "pythia-14m", "vocab_size": 320, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
        "data": {"source": "text", "path": "corpus", "train_tokenizer": 320, "sequence_length": 128, "held_out": 0.1},
        "optimizer": {"schedule_steps": 100},
        "training": {"steps": 4, "global_batch": 64, "micro_batch": 1, "precision": "fp32", "evaluation_sequences": 4},
        "logging": {"progress": False},
    }
    run["data"]["cache"] = str(root / "cache")
    (root / "RUN.yaml").write_text(yaml.safe_dump(run))


def _write_task(root: Path) -> None:
    """The task file of docs/evaluation.md, over a file here."""
    page = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    found = re.search(r"^```yaml\n(task: arc_easy\n.*?)^```", page, re.S | re.M)
    assert found is not None
    (root / "my_tasks").mkdir()
    (root / "my_tasks/arc_easy.yaml").write_text(found[1].replace("/data/", f"{root}/"))
    questions = [{"query": SENTENCES[i % 5], "choices": ["rain", "two lemons"], "gold": i % 2} for i in range(12)]
    (root / "arc_easy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))


def test_every_mark_excludes_a_command_of_its_block():
    for page, excluded, block in blocks():
        for words in excluded:
            assert any(command.startswith(words) for command in block), f"{page}: no command begins with {words!r}"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(MARK.findall(text)) == sum(len(MARK.findall(marks)) for marks, _ in BLOCK.findall(text)), page.name


def test_there_are_commands_and_every_page_s_blocks_are_labelled():
    assert len(commands()) > 40
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            if language != "bash":
                started = re.findall(r"^(?:\$ )?(?:l2e-ds|launch/\S+\.sh|deepspeed|srun|sbatch|torchrun) ", block, re.M)
                assert not started, f"{page.name}: a block with commands must be ```bash: {block[:80]}"


@pytest.mark.full
@pytest.mark.parametrize(("page", "command"), commands())
def test_command(page, command, folder, monkeypatch, capsys):
    if command in ELSEWHERE:
        assert command.split()[0] in (REPOSITORY / ELSEWHERE[command]).read_text()
        return
    monkeypatch.chdir(folder)
    words = [word for word in shlex.split(command) if word != "..."]
    words = [{"NAME": "NAME.json", "FILE": "FILE.jsonl"}.get(word, word) for word in words]
    if "--output" in words and words[1] != "report":  # of the command before
        for path in folder.glob(f"{words[words.index('--output') + 1]}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if words[0] != "l2e-ds" or words[1] == "doctor" or (words[1] == "train" and "--dry-run" not in words):
        run_command(words)
        return
    words, *target = (list(part) for is_sign, part in groupby(words, ">".__eq__) if not is_sign)
    code = main(words[1:])
    said = capsys.readouterr()
    assert code == 0, said.err[-2000:]
    for (path,) in target:
        Path(path).write_text(said.out)
