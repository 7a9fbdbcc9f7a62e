# Four images, each locked, without root, and content with a read-only root file system (scratch: /tmp):
#   data    ingest, validate, build_features                        docker build --target data  -t longtrail-data .
#   train   every step of the pipeline                              docker build --target train -t longtrail-train .
#   spark   ingest and build_features where they run Spark          docker build --target spark -t longtrail-spark .
#   bento   the packaged service, from build/bento                  docker build --target bento -t longtrail-bento .
# `make images` builds them, spark where it is asked for (IMAGES=spark). Any base with Python 3.11 or 3.12 and venv will do; a GPU image on NVIDIA's own base:
#   --build-arg TRAIN_BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04
# During the build nothing but the package registries is reached; a mirror, or an index with CPU-only wheels of torch, is named by pip's own
# variables: --build-arg PIP_INDEX_URL=… --build-arg PIP_EXTRA_INDEX_URL=…
ARG BASE=python:3.11-slim-bookworm
ARG TRAIN_BASE

# ---------------------------------------------------------------- what all images have

# Packages are installed here and in the build stages below, each on top of one that has most of them, and only /venv is copied out of them:
# pip's settings (an index may have a password) are in no image's history.
FROM ${BASE} AS build-common
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements.lock pyproject.toml ./
COPY tools/requirements.py tools/
RUN python3 -m venv /venv \
    && python3 tools/requirements.py common > wanted.txt \
    && /venv/bin/python -m pip install --constraint requirements.lock --requirement wanted.txt

# ---------------------------------------------------------------- data

FROM build-common AS build-data
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python3 tools/requirements.py data > wanted.txt \
    && /venv/bin/python -m pip install --constraint requirements.lock --requirement wanted.txt

FROM ${BASE} AS data
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="Longtrail: data" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/venv/bin:$PATH PYTHONPATH=/longtrail PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    FEAST_USAGE=False DVC_NO_ANALYTICS=1 DVC_SITE_CACHE_DIR=/tmp/dvc LONGTRAIL_COMMIT=${GIT_COMMIT}
COPY --from=build-data /venv /venv
COPY longtrail /longtrail/longtrail
COPY components /longtrail/components
COPY features /longtrail/features
COPY pipelines /longtrail/pipelines
WORKDIR /longtrail
USER 10001:10001
# A step runs to its end; its exit code is its health.
HEALTHCHECK NONE
CMD ["python", "-m", "components.ingest", "--help"]

# ---------------------------------------------------------------- train

# On another base, with another Python perhaps, everything is installed anew.
FROM ${TRAIN_BASE:-build-data} AS build-train
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements.lock pyproject.toml ./
COPY tools/requirements.py tools/apt.sh tools/
RUN { [ -x /venv/bin/python ] || python3 -c 'import ensurepip' 2>/dev/null || sh tools/apt.sh python3 python3-venv; } \
    && { [ -x /venv/bin/python ] || python3 -m venv /venv; } \
    && /venv/bin/python tools/requirements.py train > wanted.txt \
    && /venv/bin/python -m pip install --constraint requirements.lock --requirement wanted.txt

FROM ${TRAIN_BASE:-${BASE}} AS train
# Python where the base has none (CUDA's have not), and git, which DVC's libraries look for.
COPY tools/apt.sh /tmp/
RUN { command -v python3 && command -v git; } >/dev/null || sh /tmp/apt.sh python3 git; rm -rf /tmp/apt.sh /var/lib/apt/lists/*
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="Longtrail: every step" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/venv/bin:$PATH PYTHONPATH=/longtrail PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba FEAST_USAGE=False BENTOML_DO_NOT_TRACK=True DVC_NO_ANALYTICS=1 DVC_SITE_CACHE_DIR=/tmp/dvc LONGTRAIL_COMMIT=${GIT_COMMIT}
COPY --from=build-train /venv /venv
COPY longtrail /longtrail/longtrail
COPY components /longtrail/components
COPY features /longtrail/features
COPY pipelines /longtrail/pipelines
COPY serving /longtrail/serving
WORKDIR /longtrail
USER 10001:10001
HEALTHCHECK NONE
CMD ["python", "-m", "components.train", "--help"]

# ---------------------------------------------------------------- spark

# `data` with Java and pyspark on top, so that a node that has `data` pulls these alone.
FROM build-common AS build-spark
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python3 tools/requirements.py spark > wanted.txt \
    && /venv/bin/python -m pip install --constraint requirements.lock --no-deps --target /spark --requirement wanted.txt

FROM data AS spark
USER root
# Java asks for its user's name, and Debian's package for the folder of manuals that small bases lack.
COPY tools/apt.sh /tmp/
RUN mkdir -p /usr/share/man/man1 && sh /tmp/apt.sh default-jre-headless && rm -rf /tmp/apt.sh /var/lib/apt/lists/* \
    && echo "longtrail:x:10001:10001::/tmp:/usr/sbin/nologin" >> /etc/passwd
COPY --from=build-spark /spark /spark
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="Longtrail: data on Spark" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PYTHONPATH=/longtrail:/spark
USER 10001:10001
HEALTHCHECK NONE

# ---------------------------------------------------------------- bento

FROM build-common AS build-bento
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY build/bento/env/python/requirements.txt ./
RUN /venv/bin/python -m pip install --constraint requirements.lock --requirement requirements.txt \
    && mkdir /state

FROM ${BASE} AS bento
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="Longtrail: the packaged service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp LONGTRAIL_STATE=/state
COPY --from=build-bento /venv /venv
COPY --from=build-bento --chown=10001:10001 /state /state
COPY build/bento /bento
# The service starts from the code in the Bento; a new one that is swapped in brings its own.
WORKDIR /bento/src
USER 10001:10001
VOLUME /state
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/livez', timeout=4)"]
ENTRYPOINT ["python", "-m", "serving.run", "--bento", "/bento"]
CMD ["--host", "0.0.0.0", "--port", "3000"]
