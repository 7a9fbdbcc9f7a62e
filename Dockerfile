# The image every step of the pipeline runs in. Name a target, `cpu` or `cuda`; both run as a user without rights.
#   docker build --target cpu -t longtrail:latest .
#   docker build --target cuda --build-arg CUDA_BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 -t longtrail:cuda .
# Any base with Python 3.11 or 3.12, venv and git will do. During the build nothing but the package registries is reached; a mirror, or an
# index with CPU-only wheels of torch, is named by pip's own variables: --build-arg PIP_INDEX_URL=… --build-arg PIP_EXTRA_INDEX_URL=…
ARG CPU_BASE=python:3.11-slim-bookworm
ARG CUDA_BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04

FROM ${CPU_BASE} AS build-cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /longtrail
COPY requirements.lock ./
RUN python3 -m venv /venv && /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -r requirements.lock
COPY . .
RUN /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --editable .

FROM ${CPU_BASE} AS cpu
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 BENTOML_DO_NOT_TRACK=True DVC_NO_ANALYTICS=1 FEAST_USAGE=False HOME=/tmp
COPY --from=build-cpu /venv /venv
COPY --from=build-cpu /longtrail /longtrail
WORKDIR /longtrail
USER 10001:10001
CMD ["python", "-c", "import components; print('Longtrail: run python -m components.STEP --help')"]

FROM ${CUDA_BASE} AS base-cuda
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv git \
    && rm -rf /var/lib/apt/lists/*

FROM base-cuda AS build-cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /longtrail
COPY requirements.lock ./
RUN python3 -m venv /venv && /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -r requirements.lock
COPY . .
RUN /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --editable .

FROM base-cuda AS cuda
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 BENTOML_DO_NOT_TRACK=True DVC_NO_ANALYTICS=1 FEAST_USAGE=False HOME=/tmp
COPY --from=build-cuda /venv /venv
COPY --from=build-cuda /longtrail /longtrail
WORKDIR /longtrail
USER 10001:10001
CMD ["python", "-c", "import components, torch; print('Longtrail: run python -m components.STEP --help; CUDA:', torch.cuda.is_available())"]
