"""A submission on its way: Kubeflow's own client, and refusals that say what to do where it would wait, or show a traceback."""

import contextlib
import io
import json
import logging
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtrail.errors import LongtrailError

if TYPE_CHECKING:
    from pipelines.submit import Submission


class SubmissionError(LongtrailError):
    """Kubeflow could not be reached, or would not take the run."""


def send(submission: "Submission", compiled: Path) -> str:
    """Send the compiled pipeline; returns a sentence with the run's address. Raises SubmissionError."""
    health = healthy(submission)
    if health.get("multi_user") and not submission.namespace:
        raise SubmissionError(f"{submission.host}: it has several users; expected --namespace, your profile's")
    import kfp_server_api

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints links as it goes
            warnings.simplefilter("ignore")
            return _send(submission, compiled)
    except kfp_server_api.ApiException as error:
        raise SubmissionError(f"{submission.host}: HTTP {error.status} {error.reason}: {_reason(error.body)}") from None


def healthy(submission: "Submission") -> dict[str, Any]:
    """Kubeflow's answer to "are you there?". Raises SubmissionError where it is none: the client itself would try for half a minute."""
    url = f"{submission.host}/apis/v2beta1/healthz"
    headers = {"Authorization": f"Bearer {submission.token}"} if submission.token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        hint = "; expected a token that may use it: $LONGTRAIL_KFP_TOKEN or --token-file" if error.code in (401, 403) else ""
        raise SubmissionError(f"{url}: HTTP {error.code} {error.reason}{hint}") from None
    except OSError as error:
        raise SubmissionError(f"{url}: {getattr(error, 'reason', error)}; expected Kubeflow Pipelines, or a port forwarded to it") from None
    except ValueError:
        raise SubmissionError(f"{url}: no JSON: a login page, or another service; expected Kubeflow Pipelines and a token that it takes") from None
    return found if isinstance(found, dict) else {}


def _send(submission: "Submission", compiled: Path) -> str:
    import kfp

    logging.getLogger("kfp").setLevel(logging.WARNING)
    client = kfp.Client(host=submission.host, existing_token=submission.token, namespace=submission.namespace or "kubeflow")
    experiment = client.create_experiment(submission.experiment, namespace=submission.namespace)
    common: dict[str, Any] = {
        "experiment_id": experiment.experiment_id,
        "job_name": submission.run_name,
        "pipeline_package_path": str(compiled),
        "params": submission.parameters,
        "pipeline_root": submission.pipeline_root,
    }
    if submission.cron is None:
        made = client.run_pipeline(**common)
        return f"{submission.run_name}: sent; {submission.host}/#/runs/details/{made.run_id}"
    made = client.create_recurring_run(**common, cron_expression=submission.cron, max_concurrency=1, no_catchup=True)
    return f"{submission.run_name}: every {submission.cron}; {submission.host}/#/recurringrun/details/{made.recurring_run_id}"


def _reason(body: Any) -> str:
    """The message in Kubeflow's JSON, else the start of what it said."""
    try:
        found = json.loads(body)
        return str(found.get("error") or found.get("message") or found)[:500]
    except (TypeError, ValueError, AttributeError):
        return str(body)[:500]
