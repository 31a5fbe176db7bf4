"""A run from local folders speaks to nobody, and tells nobody what it finds in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Plans and trains, and offline evaluates, generates and exports too, with every way to the network closed and noted.
WORK = """
import os, socket, sys
from pathlib import Path

asked = []

def closed(*arguments, **_):
    asked.append(arguments[-1])
    raise OSError("the network is closed")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = closed
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = closed

if __name__ == "__main__":
    import qwenft as qf

    folder, base = Path(sys.argv[1]), sys.argv[2]
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(12)
    ]
    recipe = qf.Recipe(
        qf.ModelSpec(base, dtype="float32"),
        qf.DataSpec.messages(rows).with_max_length(64).pack().hold_out(0.2),
        training=qf.TrainingSpec(max_steps=2, evaluate_every=1, save_every=1, sample_prompts=["Hi"]),
    )
    recipe.save(folder / "recipe.json")
    plan = recipe.compile()
    print(plan.explain())
    run = plan.train(folder / "run")
    print(run)
    offline = "HF_HUB_OFFLINE" in os.environ
    if offline:
        print(run.evaluate(), run.generate("Hi", max_new_tokens=4))
        run.export(folder / "export")
        (folder / "card.md").write_text(run.card())
    assert not asked, asked
    # Online the id is asked for, and again and again where nobody answers.
    for wrong in ("nothing-at-all", "nobody/nothing")[: 1 + offline]:
        try:
            qf.Recipe(qf.ModelSpec(wrong)).compile()
        except qf.CheckpointError as error:
            print(error)
    assert not asked, asked
"""
SECRETS = {
    "HF_TOKEN": "hf_SecretOfTheTestsOfQwenft0000000000",
    "HUGGING_FACE_HUB_TOKEN": "hf_AnotherSecretOfTheTests00000000000",
    "WANDB_API_KEY": "5ec2e70f7e57500000000000000000000000wandb",
    "AWS_SECRET_ACCESS_KEY": "SecretOfTheTests/Aws/00000000000000000000",
    "OPENAI_API_KEY": "sk-SecretOfTheTestsOfQwenft0000000000000",
    "MY_PASSWORD": "SecretPasswordOfTheTests",
}
IN_FILE = "hf_SecretInAFileOfTheTestsOfQwenft00000"


@pytest.mark.parametrize(
    "offline", [pytest.param(True, id="offline", marks=pytest.mark.long), pytest.param(False, id="online")]
)
def test_a_run_opens_no_connection_and_keeps_no_secret(dense_checkpoint, tmp_path, offline):
    """No socket is asked for, and offline for a named id neither; no token is in a file, a log or an error."""
    home, out = tmp_path / "home", tmp_path / "out"
    (home / "huggingface").mkdir(parents=True)
    out.mkdir()
    (home / "huggingface" / "token").write_text(IN_FILE)
    (tmp_path / "work.py").write_text(WORK)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {**SECRETS, "HF_HOME": str(home / "huggingface"), "QWENFT_CACHE": str(out / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    environment.pop("TRANSFORMERS_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "work.py"), str(out), str(dense_checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "'nothing-at-all' is neither a folder nor a hub id" in said
    assert ("the hub does not give it" in said) == offline
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"recipe.json", "metrics.jsonl", "environment.json", "manifest.json"} <= {file.name for file in files}
    for secret in (*SECRETS.values(), IN_FILE):
        assert secret not in said
        assert not [file for file in files if secret.encode() in file.read_bytes()]


def test_no_recipe_turns_telemetry_on():
    """What would send something of its own accord is no dependency."""
    named = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition("[project.optional")[0]
    assert not [name for name in ("wandb", "mlflow", "sentry", "posthog", "comet") if f'"{name}' in named]
