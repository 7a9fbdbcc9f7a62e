"""Where and how the steps of the compiled Kubeflow pipeline run."""

from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from longtrail.config.base import Count, Positive, PositiveFloat, Settings

Cpu = Annotated[str, Field(pattern=r"^(\d*\.)?\d+m?$", description='CPUs, as Kubernetes writes them: "2", "0.5", "500m"')]
Memory = Annotated[str, Field(pattern=r"^\d+([EPTGMK]i?)?$", description="bytes, as Kubernetes writes them: 8G, 512Mi")]
Step = Literal["look", "ingest", "validate", "build_features", "train", "evaluate", "select", "ab_test", "package", "publish", "report"]
STEPS: tuple[str, ...] = get_args(Step)
DATA_STEPS = ("look", "ingest", "validate", "build_features", "report")  # what the Dockerfile's target `data` has the packages for
SMALL_STEPS = ("look", "report")  # they read a list of files, or of tasks


class Toleration(Settings):
    """A taint of nodes that a step may run on all the same, as Kubernetes has it."""

    key: str | None = Field(None, description="the taint's key; null, with Exists, is any")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="Equal: key and value are the taint's; Exists: the key is, whatever its value")
    value: str | None = Field(None, description="the taint's value; with Exists none")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="null is any")

    @model_validator(mode="after")
    def _makes_sense(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"operator is Exists and value is {self.value!r}; expected no value")
        if self.operator == "Equal" and (self.key is None or self.value is None):
            raise ValueError("operator is Equal; expected a key and a value")
        return self


class StepSettings(Settings):
    """What differs for one step; null is the cluster's own. Node selectors and labels are added to the cluster's, tolerations too."""

    image: str | None = Field(None, description="the container image that the step runs in")
    cpu: Cpu | None = Field(None, description="CPUs that the step asks for")
    memory: Memory | None = Field(None, description="memory that the step asks for")
    gpus: Count | None = Field(None, description="GPUs that the step asks for")
    gpu_type: str | None = Field(None, description="what Kubernetes calls them")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that the step's nodes must have too")
    tolerations: tuple[Toleration, ...] = Field((), description="taints of nodes that the step may run on all the same, too")
    labels: dict[str, str] = Field(default_factory=dict, description="labels of the step's pods, too")


class Placement(NamedTuple):
    """What one step asks for, all defaults resolved."""

    image: str
    cpu: str
    memory: str
    gpus: int
    gpu_type: str
    node_selector: dict[str, str]
    tolerations: tuple[Toleration, ...]
    labels: dict[str, str]


class ClusterSettings(Settings):
    """How the compiled Kubeflow pipeline runs its steps."""

    image: str = Field("longtrail-train:latest", description="the container image that the steps run in")
    data_image: str | None = Field(
        None, description="a smaller one for look, ingest, validate, build_features and report (longtrail-data); null: `image`"
    )
    spark_image: str | None = Field(
        None,
        description="the image of the steps that run Spark (longtrail-spark): ingest and build_features where `ingest.engine` is spark, "
        "build_features where `features.offline_store` is; null: these steps must have an image of their own in `steps`",
    )
    caching: bool = Field(True, description="reuse what a step wrote before for the same inputs and image; never done for an image whose tag moves")
    parallelism: Positive = Field(2, description="models trained at the same time")
    cpu: Cpu = Field("2", description='CPUs that each step asks for, as Kubernetes writes them: "2", "0.5", "500m"; look and report ask for 500m')
    memory: Memory = Field("8G", description="memory that each step asks for, as Kubernetes writes it: 8G, 512Mi; look and report ask for 1G")
    gpus: Count = Field(0, description="GPUs that each training step asks for; other steps ask for none, unless `steps` says so")
    gpu_type: str = Field("nvidia.com/gpu", description="what Kubernetes calls a GPU")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that the nodes of all steps must have")
    tolerations: tuple[Toleration, ...] = Field((), description="taints of nodes that all steps may run on all the same")
    labels: dict[str, str] = Field(default_factory=dict, description="labels of the pods of all steps")
    steps: dict[Step, StepSettings] = Field(default_factory=dict, description="what differs, by step")
    retries: Count = Field(
        2, description="times a step is tried again, in its own process, after an error that may pass: a network, a store, a busy disk"
    )
    retry_wait_s: PositiveFloat = Field(30.0, description="seconds before the first of them; each later wait is twice as long, ten minutes at most")
    pod_retries: Count = Field(
        0, description="times Kubeflow starts a step's pod again, whatever it failed of: Kubeflow cannot tell a bad setting from a lost node"
    )
    pipeline_root: str | None = Field(None, description="where artifacts go, e.g. s3://longtrail/kubeflow; null: Kubeflow's own default")
    redis_secret: str | None = Field(
        None, description="the Kubernetes secret whose key `password` is $REDIS_PASSWORD in the steps that reach the online store"
    )
    storage_secret: str | None = Field(
        None,
        description="the Kubernetes secret whose keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL are the environment of the steps "
        "that read or write s3:// themselves (look, ingest, train, publish)",
    )
    webhook_secret: str | None = Field(
        None, description="the Kubernetes secret whose key `url` is told how each run ended, as JSON; null: nobody is told"
    )
    api: str = Field(
        "http://ml-pipeline.kubeflow.svc.cluster.local:8888", description="Kubeflow's API as pods reach it: the run's report asks it what ran"
    )
    previous: str | None = Field(
        None,
        description="where a run leaves its models, and where the next finds them and goes on from them: a folder of the volume `claim`, mounted "
        "at /data, or an s3:// address; null: every run learns from nothing",
    )
    nodes: Positive = Field(1, description="machines that train one model together (pipelines.trainjob)")
    claim: str = Field("longtrail-data", description="the volume claim with features, models and checkpoints, shared by them (ReadWriteMany)")

    def of(self, step: str) -> Placement:
        """What `step` asks for."""
        own = self.steps.get(step, StepSettings())  # type: ignore[call-overload]
        gpus = own.gpus if own.gpus is not None else (self.gpus if step == "train" else 0)
        small = step in SMALL_STEPS
        return Placement(
            image=own.image or (self.data_image if step in DATA_STEPS else None) or self.image,
            cpu=own.cpu or ("500m" if small else self.cpu),
            memory=own.memory or ("1G" if small else self.memory),
            gpus=gpus,
            gpu_type=own.gpu_type or self.gpu_type,
            node_selector=self.node_selector | own.node_selector,
            tolerations=self.tolerations + own.tolerations,
            labels=self.labels | own.labels,
        )
