"""The scripts for TPUs: every command line that they run, what they refuse, and how they resume."""

import subprocess
from pathlib import Path

import pytest
from support.cloud import COMMIT, ROOT, StandIns

NAMES = ("create", "setup", "launch", "status", "logs", "stop", "watch", "delete")
WHERE = ("tiny", "--zone", "us-central2-b")
VM = ("gcloud", "compute", "tpus", "tpu-vm")
QUEUE = ("gcloud", "compute", "tpus", "queued-resources")
AT = ("tiny", "--zone=us-central2-b")
TRAIN = ("-m", "emor3_jax.train", "--config=configs/tpu_v4.py", "--config.data.x=(1, 2)")


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    """Programs that note how they are called."""
    return StandIns(tmp_path)


def calls(cloud: StandIns, script: str, *arguments: str) -> list[tuple[str, ...]]:
    """What a script runs; it must end well."""
    done = cloud.run(script, *WHERE, *arguments)
    assert done.returncode == 0, done.stderr
    return [tuple(call) for call in cloud.calls()]


def printed(done: subprocess.CompletedProcess) -> list[tuple[str, ...]]:
    """The commands that a script printed with --dry-run, each in words."""
    out = []
    for line in done.stdout.splitlines():
        # Bash writes line breaks as $'…\n…', which shlex does not know.
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        )
        out.append(tuple(words.stdout.split("\0")[:-1]))
    return out


@pytest.mark.parametrize("script", NAMES)
def test_each_explains_itself_and_refuses_what_it_does_not_know(cloud, script: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / "tpu" / f"{script}.sh").read_text()
    done = cloud.run(script, "--help")
    assert done.returncode == 0
    assert f"tpu/{script}.sh NAME --zone ZONE" in done.stdout
    assert "--dry-run" in done.stdout and "--queued" in done.stdout
    for arguments, said in (
        (("--zone", "z"), "the name of the TPU is missing"),
        (("tiny",), "--zone is missing"),
        ((*WHERE, "--zone"), "--zone needs a value"),
        ((*WHERE, "--wrong"), "unknown argument: --wrong"),
    ):
        done = cloud.run(script, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("kind", "accelerator", "version"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_a_tpu_vm_has_the_runtime_of_its_type(cloud, kind, accelerator, version) -> None:
    wanted = (f"--accelerator-type={accelerator}", f"--version={version}")
    assert calls(cloud, "create", "--type", kind) == [(*VM, "create", *AT, *wanted)]
    spot = calls(cloud, "create", "--type", kind, "--spot", "--project", "our")
    assert spot == [(*VM, "create", *AT, "--project=our", *wanted, "--spot")]


def test_a_queued_tpu_is_a_request_for_one_node(cloud) -> None:
    options = ("--type", "v5e-16", "--queued", "--spot", "--wait", "6h")
    account = ("--service-account", "a@b")
    assert calls(cloud, "create", *options, *account) == [
        (
            *(*QUEUE, "create", *AT, "--accelerator-type=v5litepod-16"),
            *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=tiny", "--spot"),
            *("--service-account=a@b", "--scopes=cloud-platform", "--valid-until-duration=6h"),
        )
    ]


def test_several_slices_are_queued_as_one_request(cloud) -> None:
    assert calls(cloud, "create", "--type", "v4-16", "--slices", "2") == [
        (
            *(*QUEUE, "create", *AT, "--accelerator-type=v4-16"),
            *("--runtime-version=tpu-ubuntu2204-base", "--node-count=2", "--node-prefix=tiny"),
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--type is missing"),
        (("--type",), "--type needs a value"),
        (("--type", "v9-8"), "no runtime is known for --type v9-8: give --version"),
        (("--type", "v4-8", "--slices", "two"), "--slices must be a number, not two"),
        (("--type", "v4-8", "--wait", "6h"), "--wait needs --queued"),
    ],
)
def test_what_create_cannot_do_costs_nothing(cloud, arguments, said) -> None:
    for script, more in (("create", ()), ("watch", ("--", *TRAIN))):
        done = cloud.run(script, *WHERE, *arguments, *more)
        assert done.returncode == 2 and said in done.stderr
    assert all(call[0] == "git" for call in cloud.calls())
    assert calls(cloud, "create", "--type", "v9-8", "--version", "mine")[0][-1] == "--version=mine"


def test_a_value_may_stand_behind_an_equals_sign(cloud) -> None:
    done = cloud.run("create", "tiny", "--zone=us-central2-b", "--type=v5e-16", "--slices=2")
    assert done.returncode == 0
    ran = [tuple(call) for call in cloud.calls()]
    assert ran == calls(cloud, "create", "--type", "v5e-16", "--slices", "2")
    # What follows -- is the program's.
    assert "--a=b" in calls(cloud, "launch", "--", "-m", "x", "--a=b")[-1][-1]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (("-m", "emor3_jax.train"), "unknown argument: -m; put -- before the program"),
        (("--",), "the program is missing: -- -m emor3_jax.train"),
        (("--", "python", *TRAIN), "python: give the arguments of Python alone"),
        (("--", ".venv/bin/python3.11", *TRAIN), "python3.11: give the arguments of Python alone"),
        (("--", "emor3", "train"), "emor3: give the arguments of Python alone"),
    ],
)
def test_a_program_that_cannot_start_is_refused_at_once(cloud, program, said) -> None:
    for script, more in (("launch", ()), ("watch", ("--type", "v4-8"))):
        done = cloud.run(script, *WHERE, *more, *program)
        assert done.returncode == 2 and said in done.stderr
    assert cloud.calls() == []


def test_a_folder_that_goes_with_the_tpu_is_not_watched(cloud) -> None:
    wanted = "--workdir=runs/a would be lost with the TPU: name a folder of a bucket"
    given = ("--type", "v4-8", "--dry-run", "--", *TRAIN)
    for workdir in (["--workdir=runs/a"], ["--workdir", "runs/a"]):
        done = cloud.run("watch", *WHERE, *given, *workdir)
        assert done.returncode == 2 and wanted in done.stderr
    for workdir in ("gs://box/runs/a", "/home/me/gcs/box/runs/a"):
        assert cloud.run("watch", *WHERE, *given, f"--workdir={workdir}").returncode == 0


def test_setup_copies_a_commit_and_installs_it_on_all_workers(cloud) -> None:
    archive, copy, install = calls(cloud, "setup")
    assert archive[:5] == ("git", "-C", str(ROOT), "archive", "--format=tar.gz")
    assert archive[5] == f"--output={copy[5]}" and archive[6] == "HEAD"
    assert copy[:5] == (*VM, "scp") and copy[5].endswith("/emor3_jax.tar.gz")
    assert copy[6:] == ("tiny:", "--zone=us-central2-b", "--worker=all")
    assert install[:-1] == (*VM, "ssh", *AT, "--worker=all")
    script = install[-1].removeprefix("--command=")
    assert "tar -xzf emor3_jax.tar.gz" in script and "worker.sh install" in script
    archive, copy, install = calls(cloud, "setup", "--queued", "--commit", COMMIT)
    assert archive[6] == COMMIT
    assert copy[:5] == (*QUEUE, "scp")
    assert copy[6:] == ("tiny:", "--zone=us-central2-b", "--node=all", "--worker=all")
    assert install[:-1] == (*QUEUE, "ssh", *AT, "--node=all", "--worker=all")
    # What cannot be archived is not installed.
    cloud.add("git", "exit 128")
    assert cloud.run("setup", *WHERE).returncode == 128
    assert [call[0] for call in cloud.calls()] == ["git"]


def test_launch_hands_the_program_to_all_workers_as_it_is(cloud) -> None:
    (call,) = calls(cloud, "launch", "--", *TRAIN)
    assert call[:-1] == (*VM, "ssh", *AT, "--worker=all")
    echo = call[-1].removeprefix("--command=emor3_jax/tpu/worker.sh start ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {echo}"], capture_output=True, text=True)
    assert tuple(words.stdout.split("\0")[:-1]) == TRAIN
    (call,) = calls(cloud, "launch", "--queued", "--replace", "--", *TRAIN)
    assert call[:-1] == (*QUEUE, "ssh", *AT, "--node=all", "--worker=all")
    assert call[-1].startswith("--command=emor3_jax/tpu/worker.sh start --replace -m ")
    done = cloud.run("launch", *WHERE)
    assert done.returncode == 2 and "the program is missing" in done.stderr


def test_logs_stop_and_delete(cloud) -> None:
    log = "emor3_jax/logs/run.log"
    assert calls(cloud, "logs") == [
        (*VM, "ssh", *AT, "--worker=0", f"--command=tail --lines=50 {log}")
    ]
    assert calls(cloud, "logs", "--queued", "--slice", "1", "--worker", "all", "--follow") == [
        (
            *(*QUEUE, "ssh", *AT, "--node=1", "--worker=all"),
            f"--command=tail --lines=50 --follow {log}",
        )
    ]
    stop = "--command=emor3_jax/tpu/worker.sh stop"
    assert calls(cloud, "stop") == [(*VM, "ssh", *AT, "--worker=all", stop)]
    assert calls(cloud, "stop", "--queued") == [
        (*QUEUE, "ssh", *AT, "--node=all", "--worker=all", stop)
    ]
    assert calls(cloud, "delete") == [(*VM, "delete", *AT)]
    assert calls(cloud, "delete", "--yes") == [(*VM, "delete", *AT, "--quiet")]
    assert calls(cloud, "delete", "--queued") == [(*QUEUE, "delete", *AT, "--force")]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("create", ("--type", "v4-16", "--slices", "2", "--spot")),
        ("launch", ("--", *TRAIN)),
        ("logs", ("--follow",)),
        ("stop", ("--queued",)),
        ("delete", ("--queued", "--yes")),
    ],
)
def test_a_dry_run_prints_the_commands_and_runs_none(cloud, script, arguments) -> None:
    done = cloud.run(script, *WHERE, "--dry-run", *arguments)
    assert done.returncode == 0 and cloud.calls() == []
    assert printed(done) == calls(cloud, script, *arguments)


def test_status_tells_of_the_tpu_and_of_the_run(cloud) -> None:
    cloud.answer("run", "running")
    for queued, kind, state in (((), VM, "READY"), (("--queued",), QUEUE, "ACTIVE")):
        cloud.answer("tpu", state)
        done = cloud.run("status", *WHERE, *queued)
        assert done.stdout.splitlines() == [f"tpu: {state}", "run: running"]
        describe, ask = cloud.calls()
        field = "state.state" if queued else "state"
        assert describe == [*kind, "describe", *AT, f"--format=value({field})"]
        assert ask[:7] == [*kind, "ssh", *AT]
    for answer, said in (("ABSENT", "ABSENT"), ("OFFLINE", "UNKNOWN: ERROR: no network")):
        cloud.answer("tpu", answer)
        assert cloud.run("status", *WHERE).stdout == f"tpu: {said}\n"


def test_a_project_is_prepared_once(cloud) -> None:
    account = "emor3-tpu@our.iam.gserviceaccount.com"
    arguments = ("box", "--zone", "us-central2-b", "--project", "our")
    done = cloud.run("project", *arguments, "--dry-run")
    create = (
        *("gcloud", "storage", "buckets", "create", "gs://box", "--project=our"),
        *("--location=us-central2", "--uniform-bucket-level-access"),
        "--enable-hierarchical-namespace",
    )
    commands = printed(done)
    assert cloud.calls() == []
    assert commands[0][:4] == ("gcloud", "services", "enable", "tpu.googleapis.com")
    assert commands[1] == create
    assert commands[2][:5] == ("gcloud", "iam", "service-accounts", "create", "emor3-tpu")
    assert commands[3] == (
        *("gcloud", "storage", "buckets", "add-iam-policy-binding", "gs://box", "--project=our"),
        *(f"--member=serviceAccount:{account}", "--role=roles/storage.objectUser"),
    )
    # Where bucket and account are there, neither is made again.
    cloud.answer("tpu", "there")
    assert account in cloud.run("project", *arguments).stdout
    run = [tuple(call) for call in cloud.calls() if "describe" not in call]
    assert run == [commands[0], commands[3]]
    done = cloud.run("project", "box", "--zone", "z")
    assert done.returncode == 2 and "--project is missing" in done.stderr


def watch(cloud: StandIns, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Runs watch.sh; returns how it ended and what it did, in short."""
    done = cloud.run("watch", *WHERE, "--type", "v4-16", "--every", "0", *arguments, "--", *TRAIN)
    did = []
    for call in cloud.calls():
        if call[0] == "git":
            continue
        verb = call[4]
        if verb == "ssh":
            verb = call[-1].removeprefix("--command=").split("worker.sh ")[-1].split(" -m")[0]
            verb = verb.split(";")[0]
        if verb not in ("describe", "state"):
            did.append(verb)
    return done, did


START = ["scp", "install", "start --replace"]


def test_watch_starts_from_nothing_and_ends_with_the_program(cloud) -> None:
    cloud.answer("tpu", "ABSENT", "CREATING", "READY")
    cloud.answer("run", "unreachable", "none", "running", "ended 0")
    done, did = watch(cloud, "--spot")
    assert done.returncode == 0, done.stderr
    assert did == ["create", *START]
    assert "tpu/delete.sh ends the costs" in done.stdout.splitlines()[-1]


def test_watch_replaces_a_preempted_tpu_and_launches_the_same_program(cloud) -> None:
    cloud.answer("tpu", "READY", "READY", "PREEMPTED", "READY")
    cloud.answer("run", "none", "running", "none", "running", "ended 0")
    done, did = watch(cloud)
    assert done.returncode == 0
    assert did == [*START, "delete", "create", *START]


def test_watch_takes_all_slices_from_the_queue_again(cloud) -> None:
    lost = ("SUSPENDING", "SUSPENDED")
    cloud.answer("tpu", "ACTIVE", *lost, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.answer("run", "running", "none", "ended 0")
    command = ("--type", "v4-16", "--every", "0", "--slices", "2", "--spot", "--", *TRAIN)
    done = cloud.run("watch", *WHERE, *command)
    assert done.returncode == 0
    acted = [tuple(call) for call in cloud.calls() if "describe" not in call]
    acted = [call for call in acted if "worker.sh state" not in call[-1]]
    commit, delete, create, archive, copy, install, start = acted
    assert commit[3:] == ("rev-parse", "HEAD") and archive[-1] == COMMIT
    assert delete == (*QUEUE, "delete", *AT, "--force", "--quiet")
    assert create[:5] == (*QUEUE, "create") and "--node-count=2" in create and "--spot" in create
    for call in (copy, install, start):
        assert call[:4] == QUEUE and "--node=all" in call and "--worker=all" in call
    # Each state is told once, and the program is the one of the command line.
    assert done.stdout.count("SUSPENDING") == 1
    assert "emor3_jax.train" in start[-1]


@pytest.mark.parametrize(
    ("runs", "status", "did", "said"),
    [
        (("ended 75", "ended 0"), 0, START, "ended well"),
        (("gone", "ended 0"), 0, START, "ended well"),
        (("running asked", "ended 75 asked"), 0, [], "stopped as asked"),
        (("ended 2",), 2, ["tail --lines=50 emor3_jax/logs/run.log"], "refused its config"),
    ],
)
def test_watch_starts_again_only_what_should_go_on(cloud, runs, status, did, said) -> None:
    cloud.answer("tpu", "READY")
    cloud.answer("run", *runs)
    done, acted = watch(cloud)
    assert done.returncode == status and said in done.stdout
    assert acted == did


def test_watch_gives_up_after_so_many_tries(cloud) -> None:
    cloud.answer("tpu", "READY")
    cloud.answer("run", "ended 1")
    done, did = watch(cloud, "--tries", "2")
    assert done.returncode == 1 and did == START * 2
    assert "not started again after 2 starts" in done.stdout
    cloud.answer("tpu", "ABSENT")
    cloud.answer("fail", " create ")
    done, did = watch(cloud, "--tries", "3")
    assert done.returncode == 1 and did == ["create"] * 3
    assert done.stdout.count("the creation failed") == 3


def test_watch_waits_where_it_cannot_know(cloud) -> None:
    # No network: nothing is created, deleted or started.
    cloud.answer("tpu", "OFFLINE", "OFFLINE", "READY")
    cloud.answer("run", "unreachable", "running", "ended 0")
    done, did = watch(cloud)
    assert done.returncode == 0 and did == []
    assert done.stdout.count("UNKNOWN: ERROR: no network") == 1


def test_watch_shows_a_first_start_without_running_it(cloud) -> None:
    done = cloud.run("watch", *WHERE, "--type", "v4-8", "--dry-run", "--", *TRAIN)
    assert done.returncode == 0
    assert [call[3:] for call in cloud.calls()] == [["rev-parse", "HEAD"]]
    create, archive, copy, install, launch = printed(done)
    assert create[4] == "create" and archive[-1] == COMMIT
    assert copy[4] == "scp" and "install" in install[-1] and "emor3_jax.train" in launch[-1]


def test_the_readme_names_every_script() -> None:
    text = (ROOT / "tpu" / "README.md").read_text()
    for path in (ROOT / "tpu").glob("*.sh"):
        assert path.name == "common.sh" or f"| `{path.name}` |" in text
