"""The images without a Docker engine: their own instructions, run in a folder, and linters that know them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compose_spec import ComposeSpecification
from compose_spec.models import Service
from docker.utils.build import exclude_paths
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
KINDS = {"cpu.Dockerfile": "cpu", "train.Dockerfile": "gpu"}
BIN = Path(sys.executable).parent
TOOLS = f"{BIN}{os.pathsep}{os.environ['PATH']}"


def instructions(name):
    """Pairs of a Dockerfile's instruction and its words, lines that go on joined."""
    text = (ROOT / "docker" / name).read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def context():
    """Files that .dockerignore lets through, by Docker's own rules."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return sorted(path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file())


def sources(copied):
    """Every file of the context that one COPY takes, with its place below the working directory."""
    *wanted, target = copied.split()
    for source in wanted:
        found = [path for path in context() if path == source or path.startswith(f"{source}/")]
        assert found, f"COPY {source}: nothing of that name reaches the builder"
        for path in found:
            inside = Path(path).relative_to(source) if path != source else Path(Path(path).name)
            yield ROOT / path, Path(target) / inside


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The virtual environment of the CPU image, made by its own COPY and RUN lines, and what each RUN line printed."""
    root = tmp_path_factory.mktemp("image")
    working, prefix, printed = root / "src", root / "venv", []
    working.mkdir()
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    for name, words in instructions("cpu.Dockerfile"):
        if name == "COPY":
            for source, target in sources(words):
                (working / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, working / target)
        elif name == "RUN" and "install.sh" in words:
            command = ["bash", "-euc", words.replace("/opt/venv", str(prefix))]
            done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.append(done.stdout)
    shutil.rmtree(working)
    return prefix, printed


def in_image(image, *command):
    """Standard output of a command of the environment: nothing of this checkout, and no network."""
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "HOME": str(image[0]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [image[0] / "bin" / command[0], *command[1:]], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_image_installs_dependencies_first_and_only_the_source_afterwards(image):
    first, second = image[1]
    assert "transformers-5." in first.split("Successfully installed ")[1]
    assert second.split("Successfully installed ")[1].split() == ["distillabse-0.1.0"]


def test_the_image_knows_its_version_and_itself(image):
    assert in_image(image, "distillabse", "--version").strip() == "0.1.0"
    where = in_image(image, "python", "-c", "import distillabse; print(distillabse.__file__)")
    assert Path(where.strip()).is_relative_to(image[0])
    assert in_image(image, "python", "-m", "pip", "check").strip() == "No broken requirements found."


def test_the_image_passes_its_own_doctor_with_onnxruntime_and_without_deepspeed(image):
    found = in_image(image, "distillabse", "doctor")
    rows = {cells[1].strip(): cells[2].strip() for line in found.splitlines() if len(cells := line.split("│")) == 4}
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found.rstrip().endswith("No problems found.")
    assert ("torch", rows["torch"].split("+")[0]) in pins
    assert ("onnxruntime", rows["onnxruntime"]) in pins and rows["CPUExecutionProvider"] == "loads"
    assert rows["deepspeed"] == rows["onnxruntime-gpu"] == "not installed"


def test_the_image_has_the_configurations_with_those_of_clusters(image):
    assert in_image(image, "distillabse", "validate", "quickstart").startswith("quickstart is valid (hash ")
    where = in_image(image, "python", "-c", "import distillabse; print(distillabse.__path__[0])")
    shipped = Path(where.strip()) / "configs"
    files = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert {"deepspeed/zero2.json", "slurm/distill.sbatch", "quickstart.yaml"} <= files
    assert {str(path.relative_to(shipped)) for path in shipped.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("kind", "extras"), [("cpu", "cpu,demo"), ("gpu", "gpu,deepspeed,eval,demo")], ids=["cpu", "gpu"]
)
def test_install_runs_one_pip_command_for_each_kind(kind, extras):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python3.12", "PIP_EXTRA": "--extra-index-url https://x/whl"}
    command = [ROOT / "docker" / "install.sh", kind, "/opt/venv"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [
        "python3.12 -m venv /opt/venv",
        f"/opt/venv/bin/python -m pip install --disable-pip-version-check --constraint {ROOT}/constraints.txt "
        f"--extra-index-url https://x/whl torch==2.13.0 {ROOT}[{extras}]",
    ]


@pytest.mark.parametrize("arguments", [["cpu"], ["tpu", "/opt/venv"], []])
def test_install_refuses_what_it_does_not_know(arguments):
    done = subprocess.run([ROOT / "docker" / "install.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "cpu" in done.stderr


@pytest.mark.parametrize("name", KINDS)
def test_images_install_their_kind_and_run_as_a_user(name):
    read = instructions(name)
    installed = [re.search(r"docker/install\.sh (\w+) (\S+)", words) for what, words in read if what == "RUN"]
    assert [match.groups() for match in installed if match] == [(KINDS[name], "/opt/venv")] * 2
    assert [words for what, words in read if what == "USER"] == ["1000"]
    assert read[-1] == ("CMD", '["--help"]') and read[-2] == ("ENTRYPOINT", '["distillabse"]')
    after_user = [what for what, _ in read[[what for what, _ in read].index("USER") :]]
    assert "RUN" not in after_user and "COPY" not in after_user


@pytest.mark.parametrize("name", KINDS)
def test_images_copy_the_whole_package_and_nothing_that_is_missing(name):
    copied = {str(target) for what, words in instructions(name) if what == "COPY" for _, target in sources(words)}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "distillabse").rglob("*") if path.is_file()}
    package = {path for path in package if "__pycache__" not in path}
    assert package <= copied
    assert {"pyproject.toml", "constraints.txt", "LICENSE", "docker/install.sh"} <= copied


def test_nothing_but_the_source_reaches_the_builder():
    # Docker itself always sends .dockerignore.
    names = {".dockerignore", "LICENSE", "README.md", "configs", "constraints.txt", "distillabse", "docker"}
    assert {path.split("/")[0] for path in context()} == {*names, "pyproject.toml"}
    assert [path for path in context() if path.startswith("docker/")] == ["docker/install.sh"]
    assert not [path for path in context() if "__pycache__" in path]


def test_the_training_image_has_what_deepspeed_builds_with():
    words = dict(instructions("train.Dockerfile"))
    assert "devel" in words["FROM"]  # nvcc
    packages = next(words for what, words in instructions("train.Dockerfile") if "apt-get install" in words).split()
    assert {"g++", "ninja-build", "python3-dev", "pdsh", "openssh-client"} <= set(packages)
    variables = dict(
        pair.split("=", 1)
        for what, words in instructions("train.Dockerfile")
        if what == "ENV"
        for pair in words.split()
    )
    assert variables["TORCH_EXTENSIONS_DIR"] == "/tmp/torch_extensions"  # any user may write there


@pytest.mark.parametrize("name", KINDS)
def test_hadolint_finds_nothing(name):
    done = subprocess.run(
        ["hadolint", "--no-color", ROOT / "docker" / name],
        env={**os.environ, "PATH": TOOLS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing():
    scripts = [ROOT / "docker" / "install.sh", *(ROOT / "configs" / "slurm").iterdir()]
    done = subprocess.run(["shellcheck", *scripts], env={**os.environ, "PATH": TOOLS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def compose():
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_compose_is_valid_and_builds_from_the_dockerfiles(compose):
    checked = ComposeSpecification.model_validate(compose)
    known = {field.alias or name for name, field in Service.model_fields.items()}
    dockerfiles = {}
    for name, service in compose["services"].items():
        assert service.keys() <= known
        folder = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert folder == ROOT
        dockerfiles[name] = service["build"]["dockerfile"]
        assert (folder / dockerfiles[name]).is_file()
    assert dockerfiles == {
        "train": "docker/train.Dockerfile",
        "train-node": "docker/train.Dockerfile",
        "cpu": "docker/cpu.Dockerfile",
    }
    assert checked.services.keys() == dockerfiles.keys()


def test_compose_reserves_one_gpu_for_one_process_and_all_for_torchrun(compose):
    def devices(name):
        return compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]

    assert devices("train") == [{"driver": "nvidia", "device_ids": ["${GPU:-0}"], "capabilities": ["gpu"]}]
    assert devices("train-node") == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert "deploy" not in compose["services"]["cpu"]


def test_torchrun_reads_the_rendezvous_of_compose(compose, monkeypatch):
    service = compose["services"]["train-node"]
    given = {"NNODES": "2", "GPUS_PER_NODE": "4", "RDZV_ENDPOINT": "node7:29400", "RDZV_ID": "job5"}
    for name, value in service["environment"].items():
        filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: given.get(match[1], match[2]), value)
        monkeypatch.setenv(name, filled)
    launcher, *arguments = service["entrypoint"]
    assert launcher == "torchrun"
    read = get_args_parser().parse_args([*arguments, "run", "my.yaml", "--until", "distill"])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint, read.rdzv_id) == ("2", "4", "node7:29400", "job5")
    assert read.rdzv_backend == "c10d" and int(read.shutdown_timeout) == 120
    assert read.module and read.training_script == "distillabse"
    assert read.training_script_args == ["run", "my.yaml", "--until", "distill"]
