"""What publishing needs: versions that agree, and workflows that run parts which exist."""

import pathlib
import re
import subprocess
import tomllib

import processes
import pytest

yaml = pytest.importorskip("yaml")  # Flax and Orbax need it

ROOT = pathlib.Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def workflow(name: str) -> dict:
    return yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text())


def test_versions_agree() -> None:
    """In the package, the citation and the changelog, whose newest section is this version's."""
    cited = yaml.safe_load((GITHUB / "CITATION.cff").read_text())["version"]
    heading = re.search(r"^## \[(.*?)\] - ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert heading
    assert PROJECT["version"] == cited == heading[1]


def test_the_workflow_runs_every_part() -> None:
    """Each of `.ci/run --list`, and no other."""
    done = subprocess.run([ROOT / ".ci" / "run", "--list"], capture_output=True, text=True)
    parts = {line.split()[0] for line in done.stdout.splitlines()}
    jobs = workflow("ci")["jobs"].values()
    run = [x for job in jobs for x in job["strategy"]["matrix"]["parts"]]
    assert {part for x in run for part in x.split()} == parts
    text = (ROOT / ".ci" / "run").read_text()
    assert {f"run_{part}" for part in parts} <= set(re.findall(r"^(run_[\w.]+)\(\)", text, re.M))


def test_python_versions_agree() -> None:
    """Each that the package names is a part, and the release is tried with it."""
    named = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert workflow("release")["jobs"]["check"]["strategy"]["matrix"]["python"] == named
    jobs = workflow("ci")["jobs"]["run"]["strategy"]["matrix"]["parts"]
    parts = {part for x in jobs for part in x.split()}
    assert {f"python{v}" for v in named} <= parts


def test_what_was_tried_beside_is_in_the_guide() -> None:
    """Each library that `.ci/run beside` installs, with its version and Python."""
    guide = (ROOT / "notebooks" / "versions.md").read_text("utf-8").lower()
    for line in (ROOT / ".ci" / "constraints" / "beside.txt").read_text().splitlines():
        python, library, version = re.fullmatch(r"python(\S+) (\S+)==(\S+)", line).groups()  # pyright: ignore
        row = rf"\| {library.removeprefix('google-')} {re.escape(version)} \| {python} \|"
        assert re.search(row, guide), line


def test_the_package_is_a_command() -> None:
    done = processes.run("-m", "jlora", "--version")
    assert PROJECT["version"] in done.stdout, done.stderr
