"""Files for containers and services: they agree with the program, and linters accept them.

What needs hadolint, kubernetes-validate, promtool or prometheus is skipped where that isn't there.
"""

import asyncio
import configparser
import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from metrics_kit import all_metrics, values
from pydantic import SecretStr

from stream_hbaf.cli import parse
from stream_hbaf.commands.live import read_config
from stream_hbaf.config import Config, MetricsConfig
from stream_hbaf.dashboard.metrics_server import MetricsServer

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
CONTAINERFILE = (ROOT / "Containerfile").read_text(encoding="utf-8")
COPIED = re.findall(r"^COPY (?!--from)(.+) \S+$", CONTAINERFILE, flags=re.MULTILINE)
SERVICE, STATEFUL = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
UNIT = DEPLOY / "stream-hbaf.service"
DASHBOARD = json.loads((DEPLOY / "grafana" / "stream-hbaf.json").read_text(encoding="utf-8"))
HIGHEST_EXPOSURE = 2.0  # by systemd-analyze, of 10
OFFLINE_SINCE = 250  # the version of systemd from which a unit's file is scored
ignored = shutil.ignore_patterns("__pycache__", "results", "reports")  # as .dockerignore says


def program(name: str) -> str:
    """The path of a program; the test is skipped where it isn't installed."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")
    return found or pytest.skip(f"{name} isn't installed")


def settings(
    arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Config:
    """What a command line and an environment set."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_config(parse(arguments))


def assert_is_protected(config: Config) -> None:
    """Sound comes in with a token and metrics go out with one, at the ports of the files."""
    (source,) = config.sources
    assert source.where == "ws://0.0.0.0:8765"
    assert config.source.token is not None
    assert config.metrics is not None
    assert config.metrics.token is not None
    assert (config.metrics.host, config.metrics.port) == ("0.0.0.0", 8771)
    assert config.mqtt.url == "mqtt://mosquitto"


# ---- containers


def test_image_holds_all_that_is_copied() -> None:
    """What the Containerfile copies is there, and not excluded from the build's context."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    everything, *rules = (line for line in lines if not line.startswith("#"))
    assert everything == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    names = {name for line in COPIED for name in line.split()}
    assert names == kept
    for name in names:
        assert (ROOT / name).exists(), name
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    built_from = re.findall(r'^"(configs|models/[^"]+)" = ', project, flags=re.MULTILINE)
    excluded = [rule for rule in rules if not rule.startswith("!")]
    assert built_from
    assert not [path for path in built_from for rule in excluded if fnmatch(path, rule)]


def test_package_is_built_from_what_is_copied(tmp_path: Path) -> None:
    """The image's build stage has these files alone."""
    for name in {name for line in COPIED for name in line.split()}:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = ZipFile(wheel).namelist()
    assert "stream_hbaf/models/live-en/model.safetensors" in held
    assert "stream_hbaf/audio/example.flac" in held  # which the image's build recognises


def test_image_installs_extras_that_are_there() -> None:
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", CONTAINERFILE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
    assert "ARG ACCELERATOR=cpu" in CONTAINERFILE
    assert "whl/${ACCELERATOR}" in CONTAINERFILE


def test_image_passes_hadolint() -> None:
    linter = program("hadolint")
    done = subprocess.run([linter, ROOT / "Containerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_recogniser_of_compose_starts_with_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = COMPOSE["services"]["recogniser"]
    environment = recogniser["environment"]
    needed = {name for name, value in environment.items() if ":?" in value}
    assert needed == {"STREAM_HBAF_SOURCE__TOKEN", "STREAM_HBAF_METRICS__TOKEN"}
    config = settings(recogniser["command"], environment, monkeypatch)
    assert_is_protected(config)
    assert config.mqtt.node == "compose"
    assert "mosquitto" in COMPOSE["services"]
    assert "http://127.0.0.1:8771/healthz" in recogniser["healthcheck"]["test"][-1]


def test_compose_mounts_files_that_are_there_where_they_are_read() -> None:
    """And opens ports to this machine alone; every volume and secret is declared."""
    mounted: dict[str, str] = {}
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", []):
            place, inside = volume.removesuffix(":ro").split(":")
            mounted[inside] = place
            if place.startswith("."):
                assert (ROOT / place).exists(), place
            else:
                assert place in COMPOSE["volumes"], place
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["recogniser:8771"]}]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_token"
    provided = DEPLOY / "grafana" / "provisioning" / "dashboards" / "stream-hbaf.yaml"
    (provider,) = yaml.safe_load(provided.read_text(encoding="utf-8"))["providers"]
    assert f"{provider['options']['path']}/stream-hbaf.json" in mounted


def test_broker_of_compose_reads_its_settings(tmp_path: Path) -> None:
    """A real mosquitto opens the port that they name."""
    if not (broker := shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")):
        pytest.skip("mosquitto isn't installed")
    own = (DEPLOY / "mosquitto.conf").read_text(encoding="utf-8")
    for theirs, ours in {
        "listener 1883": f"listener 0 {tmp_path}/socket",
        "/mosquitto/data/": f"{tmp_path}/",
    }.items():
        assert own.count(theirs) == 1
        own = own.replace(theirs, ours)
    file = tmp_path / "mosquitto.conf"
    file.write_text(f"{own}user {getpass.getuser()}\n", encoding="utf-8")
    with subprocess.Popen([broker, "-c", file], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert any("running" in line for line in process.stderr)
        finally:
            process.kill()  # it may miss SIGTERM while it starts


def test_metrics_pass_prometheus_linter() -> None:
    """It knows names, units and types by Prometheus' conventions."""
    exposition, _ = all_metrics().exposition("")
    command = [program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=exposition, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_prometheus_takes_its_settings() -> None:
    checker = program("promtool")
    command = [checker, "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Kubernetes


def test_recogniser_of_kubernetes_starts_with_valid_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its secrets come from a Secret, and its ports and probes are those that it opens."""
    (container,) = STATEFUL["spec"]["template"]["spec"]["containers"]
    names = {each["name"]: each["valueFrom"]["secretKeyRef"]["key"] for each in container["env"]}
    assert set(names.values()) == {"source", "metrics"}
    assert_is_protected(settings(container["args"], dict.fromkeys(names, "x"), monkeypatch))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"sound": 8765, "metrics": 8771}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    for port in SERVICE["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]]


def test_parts_of_kubernetes_fit_together() -> None:
    """Selectors select, mounts have volumes, and the account is that of the image."""
    spec = STATEFUL["spec"]
    pod = spec["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    assert spec["serviceName"] == SERVICE["metadata"]["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == volumes
    assert f"XDG_STATE_HOME={mounts['state']}" in CONTAINERFILE
    assert f"USER {pod['securityContext']['runAsUser']}:" in CONTAINERFILE


def test_manifests_pass_kubernetes_schemas() -> None:
    validate = program("kubernetes-validate")
    command = [validate, "--strict", str(DEPLOY / "kubernetes.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there: systemd-analyze looks for it."""
    own = UNIT.read_text(encoding="utf-8").replace("/opt/stream-hbaf/bin/stream-hbaf", "/bin/true")
    path = tmp_path / UNIT.name
    path.write_text(own, encoding="utf-8")
    return path


def test_unit_starts_a_valid_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings file that it names."""
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read_string(UNIT.read_text(encoding="utf-8"))
    program, *arguments = shlex.split(read["Service"]["ExecStart"])
    assert program == "/opt/stream-hbaf/bin/stream-hbaf"
    (tmp_path / "settings.yaml").write_text("{}", encoding="utf-8")
    arguments[-1] = str(tmp_path / Path(arguments[-1]).name)
    config = settings(arguments, {}, monkeypatch)
    assert (config.source.where, config.metrics) == ("mic", MetricsConfig())


def test_unit_is_verified_by_systemd(unit: Path) -> None:
    command = [program("systemd-analyze"), "verify", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_is_hardly_exposed(unit: Path) -> None:
    """systemd's own score stays at "OK", where a unit without such settings has 9.6."""
    analyze = program("systemd-analyze")
    version = subprocess.run([analyze, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.split()[1]) < OFFLINE_SINCE:
        pytest.skip("this systemd-analyze scores running units only")
    command = [analyze, "security", "--offline=true", str(unit)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
    assert found is not None
    assert float(found[1]) <= HIGHEST_EXPOSURE


# ---- Grafana


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_asks_for_metrics_that_are_there() -> None:
    """Each name, with each label that is asked for or grouped by, and with values that occur."""
    labels: dict[str, set[str]] = {}
    for name, of in values(all_metrics()):
        labels.setdefault(name, set()).update(label for label, _ in of)
    for expression in expressions():
        asked = re.findall(r"((?:stream_hbaf|process)_\w+)(?:\{([^}]*)\})?", expression)
        assert asked, expression
        grouped = {g for by in re.findall(r"by \(([^)]*)\)", expression) for g in by.split(", ")}
        for name, selectors in asked:
            assert name in labels, expression
            selected = set(re.findall(r"(\w+)=~?\"", selectors)) - {"job"}
            assert selected | grouped <= labels[name], expression
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "query")
    assert variable["query"]["query"] == "label_values(stream_hbaf_utterances_total, source)"


def test_dashboard_shows_every_metric() -> None:
    """None is counted that nobody would look at."""
    shown = " ".join(expressions())
    own = {family.name for family in all_metrics().families() if "stream_hbaf" in family.name}
    assert {name for name in own if name not in shown} == set()


def test_panels_lie_beside_one_another() -> None:
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not covered & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= covered
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.slow
def test_real_prometheus_reads_the_metrics_and_answers_the_dashboard(tmp_path: Path) -> None:
    """With the token of the scrape settings; every expression is valid and gives a result."""
    asyncio.run(asyncio.wait_for(_scrape(tmp_path, program("prometheus")), 60))


async def _scrape(folder: Path, prometheus: str) -> None:
    server = MetricsServer(MetricsConfig(port=0, token=SecretStr("geheim")))
    server.metrics = all_metrics()
    await server.start()
    token = folder / "token"
    token.write_text("geheim", encoding="utf-8")
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))
    scraped["global"]["scrape_interval"] = "1s"
    (job,) = scraped["scrape_configs"]
    job["authorization"]["credentials_file"] = str(token)
    job["static_configs"] = [{"targets": [server.address.split("/")[2]]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(scraped), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        prometheus,
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/store",
        "--web.listen-address=127.0.0.1:0",
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        address = await _address_of(process)

        async def ask(expression: str) -> None:
            await asyncio.to_thread(_answered, address, expression)

        await ask('sum_over_time(up{job="stream-hbaf"}[1m]) > 2')  # a rate needs two readings
        for expression in expressions():
            await ask(expression.replace("$__rate_interval", "1m").replace("$source", ".*"))
    finally:
        process.kill()
        await process.wait()
        await server.close(1)


async def _address_of(process: asyncio.subprocess.Process) -> str:
    """Where Prometheus can be asked, once it can."""
    assert process.stderr is not None
    address = ""
    async for line in process.stderr:
        if found := re.search(rb'msg="Listening on" address=(\S+)', line):
            address = found[1].decode()
        if b"Server is ready" in line:
            return address
    raise AssertionError("prometheus didn't start")


def _answered(address: str, expression: str) -> None:
    """Wait until a query has a result."""
    query = urllib.parse.urlencode({"query": expression})
    for _ in range(100):
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}") as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
        if result:
            return
        time.sleep(0.2)
    raise AssertionError(f"no result of {expression}")
