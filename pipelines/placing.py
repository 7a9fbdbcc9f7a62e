"""Where a task of the Kubeflow pipeline runs, how often it is tried, and whether what it wrote may be used again: from `cluster` in params.yaml."""

import re
from typing import Any

from kfp import dsl, kubernetes

from longtrail.config import ClusterSettings, Config, StepSettings
from longtrail.errors import ConfigError
from pipelines.attempts import RETRIES, WAIT

STORE_STEPS = ("build_features", "package")  # what opens the online store
STORAGE_STEPS = ("look", "ingest", "train", "publish")  # what may read or write s3:// by itself
VOLUME = "/data"  # where `cluster.claim` is mounted
STORAGE_KEYS = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_ENDPOINT_URL": True}  # key, and whether it may be missing
MOVING_TAGS = {"latest", "main", "master", "head", "dev", "develop", "edge", "nightly", "snapshot", "stable", "test"}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def pinned(image: str) -> bool:
    """Whether the name means one image for good: a digest, or a tag that is not one of those that move (none, latest, main …, *-dirty).

    That a tag like 1.4 is never pushed twice is the registry's promise, not ours: only a digest proves it.
    """
    if "@" in image:
        return DIGEST.search(image) is not None
    _, colon, tag = image.rpartition("/")[2].partition(":")
    return bool(colon and tag) and tag.lower() not in MOVING_TAGS and not tag.endswith("-dirty")


def runs_spark(step: str, config: Config) -> bool:
    """Whether `step` needs pyspark and Java."""
    by_feast = step == "build_features" and config.features.offline_store == "spark"
    return by_feast or (step in ("ingest", "build_features") and config.ingest.engine == "spark")


def placement(config: Config) -> ClusterSettings:
    """`config.cluster`, in which each step that runs Spark has an image for it: its own, or `spark_image`. Raises ConfigError where neither is."""
    cluster = config.cluster
    steps = dict(cluster.steps)
    for step in ("ingest", "build_features"):
        own = steps.get(step, StepSettings())  # type: ignore[call-overload]
        if not runs_spark(step, config) or own.image:
            continue
        if cluster.spark_image is None:
            raise ConfigError(
                f"params.yaml: cluster.spark_image: {step} runs Spark by ingest.engine or features.offline_store; expected the image that has it "
                "(make images push IMAGES=spark), or one of its own in cluster.steps"
            )
        steps[step] = own.model_copy(update={"image": cluster.spark_image})  # type: ignore[index]
    return cluster.model_copy(update={"steps": steps})


def cached(step: str, cluster: ClusterSettings) -> bool:
    """Whether Kubeflow may take what `step` wrote for the same inputs before.

    Its key holds the image's name, not its content, so under a tag that moves it would serve what older code wrote. `look` reads the world,
    `report` tells of one run, `publish` writes elsewhere: none of them ever stands for another.
    """
    return cluster.caching and step not in ("look", "report", "publish") and pinned(cluster.of(step).image)


def placed(task: dsl.PipelineTask, cluster: ClusterSettings) -> Any:
    """Image, resources, nodes, labels, secrets, retries and caching of one task."""
    step = task.name.replace("-", "_")
    wanted = cluster.of(step)
    task.set_container_image(wanted.image)
    if not pinned(wanted.image):
        kubernetes.set_image_pull_policy(task, "Always")
    task.set_cpu_request(wanted.cpu).set_cpu_limit(wanted.cpu).set_memory_request(wanted.memory).set_memory_limit(wanted.memory)
    if wanted.gpus:
        task.set_accelerator_type(wanted.gpu_type).set_accelerator_limit(wanted.gpus)
    for label, value in wanted.node_selector.items():
        kubernetes.add_node_selector(task, label_key=label, label_value=value)
    for toleration in wanted.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
    for label, value in wanted.labels.items():
        kubernetes.add_pod_label(task, label_key=label, label_value=value)
    task.set_env_variable(RETRIES, str(cluster.retries)).set_env_variable(WAIT, str(cluster.retry_wait_s))
    if cluster.pod_retries and step != "report":
        task.set_retry(num_retries=cluster.pod_retries, backoff_duration=f"{round(cluster.retry_wait_s)}s", backoff_factor=2.0)
    task.set_caching_options(cached(step, cluster))
    _give_secrets(task, step, cluster)
    return task


def _give_secrets(task: dsl.PipelineTask, step: str, cluster: ClusterSettings) -> None:
    """Passwords and the shared volume, to the steps that need them alone."""
    if cluster.redis_secret and step in STORE_STEPS:
        kubernetes.use_secret_as_env(task, secret_name=cluster.redis_secret, secret_key_to_env={"password": "REDIS_PASSWORD"})
    if cluster.storage_secret and step in STORAGE_STEPS:
        for key, optional in STORAGE_KEYS.items():
            kubernetes.use_secret_as_env(task, secret_name=cluster.storage_secret, secret_key_to_env={key: key}, optional=optional)
    if cluster.webhook_secret and step == "report":
        kubernetes.use_secret_as_env(task, secret_name=cluster.webhook_secret, secret_key_to_env={"url": "LONGTRAIL_WEBHOOK"})
    if step in ("train", "publish") and cluster.previous and "://" not in cluster.previous:
        kubernetes.mount_pvc(task, pvc_name=cluster.claim, mount_path=VOLUME)
