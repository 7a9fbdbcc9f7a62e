"""Send the pipeline to a cluster: `python -m pipelines.submit --host https://kubeflow.example.com/pipeline --dry-run`.

What is sent is compiled here, from params.yaml and the options; nothing is sent that was not checked: parameters against the settings they stand for,
the schedule, the address. The token comes from $LONGTRAIL_KFP_TOKEN or a file, never from the command line, and is never printed.
"""

import hashlib
import os
import re
import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml

from components.command import run
from longtrail.config import Config, load_config, parse_config
from longtrail.errors import ConfigError
from pipelines.kubeflow import SECTIONS, settings_of, uncached, write
from pipelines.placing import runs_spark

TOKEN = "LONGTRAIL_KFP_TOKEN"
CRON_FIELDS = ("second", "minute", "hour", "day of month", "month", "day of week")
_FIELD = re.compile(r"^(\*|\?|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?(,(\*|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?)*$")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """All that is sent, and where to."""

    host: str
    experiment: str
    run_name: str
    namespace: str | None
    pipeline_root: str | None
    cron: str | None
    parameters: dict[str, Any] = field(default_factory=dict)  # those given; the others have the defaults of the compiled pipeline
    token: str | None = field(default=None, repr=False)


def submit(
    host: Annotated[str, typer.Option(help="address of Kubeflow Pipelines, e.g. https://kubeflow.example.com/pipeline or http://localhost:8888")],
    params: Annotated[Path, typer.Option(help="settings; its sections become the defaults of the pipeline's parameters")] = Path("params.yaml"),
    experiment: Annotated[str, typer.Option(help="made where it is not there")] = "longtrail",
    run_name: Annotated[str | None, typer.Option(help="default: longtrail and the time, or longtrail-recurring")] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="NAME=YAML, a parameter of the pipeline or, dotted, a value in it: train_settings.training.seed=1")
    ] = None,
    recurring: Annotated[str | None, typer.Option(help='a schedule instead of one run, as cron: "0 3 * * *" (UTC; seconds may stand first)')] = None,
    previous: Annotated[str | None, typer.Option(help="cluster.previous: the store of models that runs go on from and leave theirs in")] = None,
    pipeline_root: Annotated[str | None, typer.Option(help="where artifacts go; default: cluster.pipeline_root, else Kubeflow's own")] = None,
    namespace: Annotated[str | None, typer.Option(help="the profile's namespace, where Kubeflow has several users")] = None,
    token_file: Annotated[Path | None, typer.Option(help=f"file that holds the token; default: ${TOKEN}, where it is set")] = None,
    caching: Annotated[bool, typer.Option(help="--no-caching: run every step again")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be sent, and send nothing")] = False,
) -> None:
    """Send the pipeline, to be run once or by a schedule."""
    config = load_config(params, whole=True)
    changes: dict[str, Any] = ({} if previous is None else {"previous": previous}) | ({} if caching else {"caching": False})
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})
    submission = Submission(
        host=checked_host(host),
        experiment=experiment,
        run_name=run_name or ("longtrail-recurring" if recurring else f"longtrail-{datetime.now(UTC):%Y%m%d-%H%M%S}"),
        namespace=namespace,
        pipeline_root=pipeline_root or config.cluster.pipeline_root,
        cron=None if recurring is None else checked_cron(recurring),
        parameters=overrides(param or [], config),
        token=checked_token(host, token_file),
    )
    with TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        write(config, compiled)
        if dry_run:
            print(yaml.safe_dump(described(submission, config, compiled), sort_keys=False, width=140, allow_unicode=True), end="")
            return
        from pipelines.sending import send

        print(send(submission, compiled))
        if note := uncached(config):
            print(note)


def checked_host(host: str) -> str:
    """The address without a slash at its end. Raises ConfigError where it is none, or carries a password."""
    parts = urllib.parse.urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--host {host}: expected an address that begins with http:// or https://")
    if parts.username or parts.password:
        raise ConfigError(f"--host: it carries a user or password; expected a token in ${TOKEN} or --token-file")
    return host.rstrip("/")


def checked_token(host: str, file: Path | None) -> str | None:
    """The token, or None. Raises ConfigError where the file has none, or where it would travel in the clear beyond this machine or the cluster."""
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"--token-file {file}: {error.strerror}") from None
        if not token:
            raise ConfigError(f"--token-file {file}: it is empty; expected a token")
    else:
        token = os.environ.get(TOKEN, "").strip()
    parts = urllib.parse.urlsplit(host)
    near = parts.hostname in ("localhost", "127.0.0.1", "::1") or str(parts.hostname).endswith((".svc", ".svc.cluster.local"))
    if token and parts.scheme == "http" and not near:
        raise ConfigError(f"--host {host}: a token is not sent over http; expected https, or a port forwarded to localhost")
    return token or None


def checked_cron(text: str) -> str:
    """The schedule with six fields, as Kubeflow reads it. Raises ConfigError that names the field at fault."""
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise ConfigError(
            f"--recurring {text!r}: {len(fields)} fields; expected five ({', '.join(CRON_FIELDS[1:])}), or six with the {CRON_FIELDS[0]}"
        )
    for name, value in zip(CRON_FIELDS, fields, strict=True):
        if not _FIELD.match(value):
            raise ConfigError(f"--recurring {text!r}: {name} is {value!r}; expected a number, a range, a list, * or */step")
    return " ".join(fields)


def defaults_of(config: Config) -> dict[str, Any]:
    """The pipeline's parameters by name, with the values that the compiled pipeline has for them."""
    return {"models": list(config.pipeline.models), **{f"{step}_settings": settings_of(step, config) for step in SECTIONS}}


def overrides(given: list[str], config: Config) -> dict[str, Any]:
    """Each NAME=YAML as the pipeline's parameter it changes, whole, checked as params.yaml is. Raises ConfigError."""
    defaults = defaults_of(config)
    changed: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for entry in given:
        path, equals, text = entry.partition("=")
        name, *inside = path.split(".")
        if not equals or name not in defaults:
            raise ConfigError(f"--param {entry}: expected NAME=VALUE, NAME one of {', '.join(defaults)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--param {entry}: {text!r} is not YAML") from None
        for other, before in paths.items():  # one that stands in the other would be lost with it, or not, by which came first
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                raise ConfigError(f"--param {before} and --param {entry} both set {max(path, other, key=len)}; expected it once")
        paths[path] = entry
        changed[name] = _put(changed.get(name, defaults[name]), inside, value, entry)
    for name, value in changed.items():
        _check(name, value, config)
    return changed


def _put(values: Any, path: list[str], value: Any, entry: str) -> Any:
    """A copy of nested `values` with `value` at `path`."""
    if not path:
        return value
    if not isinstance(values, dict):
        raise ConfigError(f"--param {entry}: {path[0]} stands in something that has no names")
    return {**values, path[0]: _put(values.get(path[0], {}), path[1:], value, entry)}


def _check(name: str, value: Any, config: Config) -> None:
    if name == "models":
        known = config.models
        if not isinstance(value, list) or not value or not set(value) <= set(known):
            raise ConfigError(f"--param models: {value!r}; expected a list of some of {', '.join(known)}")
        parse_config({**config.model_dump(mode="json", include={"models", "selection"}), "pipeline": {"models": value}}, name="--param models")
        return
    step = name.removesuffix("_settings")
    strange = sorted(set(value) - set(SECTIONS[step])) if isinstance(value, dict) else [type(value).__name__]
    if strange:
        raise ConfigError(f"--param {name}: {', '.join(strange)}: unknown; expected {', '.join(SECTIONS[step])}")
    if runs_spark(step, parse_config(value, name=f"--param {name}")) and not runs_spark(step, config):
        raise ConfigError(f"--param {name}: it asks for Spark, and images are chosen when the pipeline is compiled; expected it in params.yaml")


def body(submission: Submission) -> dict[str, Any]:
    """What is posted, less the compiled pipeline and the experiment's id."""
    once: dict[str, Any] = {
        "display_name": submission.run_name,
        "runtime_config": {"parameters": submission.parameters}
        | ({"pipeline_root": submission.pipeline_root} if submission.pipeline_root is not None else {}),
    }
    if submission.cron is None:
        return once
    return {**once, "trigger": {"cron_schedule": {"cron": submission.cron}}, "mode": "ENABLE", "max_concurrency": 1, "no_catchup": True}


def described(submission: Submission, config: Config, compiled: Path) -> dict[str, Any]:
    """What would be sent, for people; the token is only said to be there."""
    spec = next(iter(yaml.safe_load_all(compiled.read_text(encoding="utf-8"))))
    return {
        "host": submission.host,
        "request": "POST /apis/v2beta1/" + ("recurringruns" if submission.cron else "runs"),
        "token": "sent, not shown" if submission.token else "none",
        "namespace": submission.namespace or "Kubeflow's own",
        "experiment": submission.experiment,
        "schedule": "cron, UTC; one run at a time, missed ones are not made up for" if submission.cron else "once, now",
        "body": body(submission),
        "pipeline": {
            "name": spec["pipelineInfo"]["name"],
            "sha256": hashlib.sha256(compiled.read_bytes()).hexdigest(),
            "images": sorted({executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}),
            "caching": uncached(config) or ("on" if config.cluster.caching else "off"),
            "previous": config.cluster.previous or "none: models learn from nothing",
            "defaults": defaults_of(config),
        },
    }


if __name__ == "__main__":
    run(submit)
