# The image of ftjob's job. Stages: stack (the locked packages), code (our wheel), common, inside, and job, the default.
#
#   docker build -t REGISTRY/ftjob --build-arg REVISION="$(git rev-parse HEAD)" .
#
# BASE      A release passes the digest too: docker.io/library/python:3.12-slim-bookworm@sha256:...
# LOCK      requirements.lock (CUDA 13, for H100 and A100; the driver must be 580 or newer), or requirements.cpu.lock.
# REVISION  The commit of this checkout, for the labels.
#
# pip's own settings (a mirror, its certificate) come as the secrets `pip.conf` and `ca.pem`, mounted as /etc/pip.conf
# and /run/secrets/ca.pem while pip runs: neither is in a layer or in the history.
#
# Of the same BASE, LOCK and checkout come the same packages and the same code, to the byte: every wheel is checked
# against its digest, ours is built with SOURCE_DATE_EPOCH, and bytecode is bound to hashes instead of times. The times
# of files are the builder's: `buildx --output type=image,rewrite-timestamp=true` or `buildah --timestamp` set them.
# Not the same over time: the Debian packages, which come as their mirror has them on the day.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

# ------------------------------------------------------------------------------------------------------------- stack
FROM ${BASE} AS stack
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/ftjob
ARG LOCK=requirements.lock
# Where pip looks besides PyPI; for the CPU lock https://download.pytorch.org/whl/cpu.
ARG PIP_EXTRA_INDEX_URL=""
COPY ${LOCK} /opt/requirements.lock
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    /opt/pip/bin/pip --python /opt/ftjob/bin/python install \
      --require-hashes --only-binary :all: --no-compile --requirement /opt/requirements.lock
# The job's user cannot write bytecode, and importing the stack without it takes 21 s of CPU time instead of 8. Some
# packages carry files that are no Python of this version, which fail here and are imported by nobody.
RUN /opt/ftjob/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/ftjob/lib || true

# -------------------------------------------------------------------------------------------------------------- code
FROM stack AS code
ARG SOURCE_DATE_EPOCH=0
COPY LICENSE README.md pyproject.toml /src/
COPY job /src/job
COPY launch /src/launch
COPY sky /src/sky
# Who may read a file is the checkout's umask, not the commit's: it must not change the wheel.
RUN chmod -R u=rwX,go=rX /src \
    && /opt/pip/bin/pip --python /opt/ftjob/bin/python wheel --no-index --no-deps --no-build-isolation -w /dist /src

# ------------------------------------------------------------------------------------------------------------ common
FROM ${BASE} AS common
# Triton compiles the launchers of its GPU kernels when they are first used, with a C compiler and Python.h.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/log/apt /var/log/*.log
RUN SOURCE_DATE_EPOCH=0 groupadd --gid 10001 ftjob \
    && SOURCE_DATE_EPOCH=0 useradd --uid 10001 --gid 10001 --no-log-init --home-dir /ftjob --no-create-home ftjob \
    && install --directory --owner 10001 --group 10001 /ftjob /ftjob/cache /ftjob/work
COPY --from=stack /opt/ftjob /opt/ftjob
RUN --mount=type=bind,from=stack,source=/opt/pip,target=/opt/pip \
    --mount=type=bind,from=code,source=/dist,target=/dist \
    /opt/pip/bin/pip --python /opt/ftjob/bin/python install --no-cache-dir --no-compile --no-index --no-deps /dist/*.whl \
    && /opt/ftjob/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/ftjob/lib/python3*/site-packages/job \
      /opt/ftjob/lib/python3*/site-packages/launch
# Everything that is written lies under /ftjob: a volume there keeps it, and the rest may be read-only but for /tmp.
ENV PATH=/opt/ftjob/bin:${PATH} \
    FTJOB_WORKDIR=/ftjob/work \
    CUDA_CACHE_PATH=/ftjob/cache/cuda \
    HF_HOME=/ftjob/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/ftjob/cache/inductor \
    TRITON_CACHE_DIR=/ftjob/cache/triton
# A test keeps it equal to pyproject.toml's.
ARG VERSION=0.1.0
ARG REVISION=""
ARG SOURCE=""
ENV FTJOB_CODE_COMMIT=${REVISION}
LABEL org.opencontainers.image.title="ftjob" \
      org.opencontainers.image.description="Recipe in, LoRA adapter out: one attempt of a QLoRA run that can be killed and resumed." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"

# ------------------------------------------------------------------------------------------------------------ inside
# For clouds where SkyPilot moves into the image instead of starting it (Kubernetes, RunPod): it comes as root, ignores
# the entrypoint, and installs with apt whatever is missing of these (kubernetes-ray.yml.j2 of SkyPilot 0.14).
FROM common AS inside
# Host keys are made when the package is installed; in a layer they would be everybody's.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      curl fuse3 lsof netcat-openbsd openssh-server patch pciutils procps rsync sudo wget \
    && rm -rf /etc/ssh/ssh_host_* /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/log/apt \
      /var/log/*.log

# --------------------------------------------------------------------------------------------------------------- job
# Started by `docker run`: PID 1 is the trainer, whose first act is to listen to SIGTERM.
FROM common AS job
ENV HOME=/ftjob
WORKDIR /ftjob
USER 10001:10001
# -P: a job.py in the working directory must not be taken for the job.
ENTRYPOINT ["python", "-P", "-m", "job"]
